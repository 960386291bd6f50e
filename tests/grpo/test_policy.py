"""The sharded policy: real processes with gloo between them. Shapes: B sequences, T positions."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, NemotronHConfig

from slurmkit.generation.engine import Request, SamplingParams
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.grpo.causal_lm import decoder_layers
from slurmkit.grpo.policy import Policy
from tests.support.policy_ranks import ROUNDS, Work, a_sample, assert_alike, run_ranks
from tests.support.small_models import make_model, tiny_llama
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def two_ranks(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    work = Work(tmp_path_factory.mktemp("two") / "run", model_path, score=("policy",))
    return work.saved, run_ranks(2, work)


@pytest.fixture(scope="module")
def one_rank(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, Work(tmp_path_factory.mktemp("one") / "run", model_path))


def test_two_ranks_with_uneven_and_empty_shares_train_as_one(
    two_ranks: tuple[Path, Any], one_rank: dict[str, Any], model_path: Path
) -> None:
    assert_alike(two_ranks[1], one_rank)
    before = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).state_dict()
    assert one_rank["weights"].keys() == before.keys()
    assert any((one_rank["weights"][name] - before[name]).abs().max() > 1e-3 for name in before)


def test_another_number_of_ranks_goes_on_from_what_two_have_saved(
    two_ranks: tuple[Path, Any], model_path: Path, tmp_path: Path
) -> None:
    saved, both = two_ranks
    work = Work(tmp_path / "alone", saved / "model", checkpoint=saved, first=len(ROUNDS) - 1)
    assert_alike(run_ranks(1, work), both)


def test_tied_embeddings_stay_one_tensor_in_memory_and_on_disk(two_ranks: tuple[Path, Any]) -> None:
    saved, both = two_ranks
    weights = both["weights"]
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    with safe_open(saved / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    opened = AutoModelForCausalLM.from_pretrained(saved / "model")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight


def test_logprobs_are_those_of_the_model_that_engines_are_given(two_ranks: tuple[Path, Any], tmp_path: Path) -> None:
    _, both = two_ranks
    make_tiny_model(tmp_path / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(two_ranks[0] / "model", dtype=torch.float32)
    model.load_state_dict(both["weights"])
    model.save_pretrained(tmp_path / "tokenizer")
    scores = both["scores"]["policy"].split([len(sample.token_ids) for sample in ROUNDS[0]])
    with torch.inference_mode():
        for sample, found_T in zip(ROUNDS[0], scores, strict=True):
            ids_T = torch.from_numpy(sample.token_ids).long()
            logprobs_TV = model(input_ids=ids_T[None]).logits[0].log_softmax(-1)
            torch.testing.assert_close(found_T[1:], logprobs_TV[:-1].gather(-1, ids_T[1:, None])[:, 0])
            assert found_T[0] == 0
    engine = TorchEngine(str(tmp_path / "tokenizer"), precision="float32", max_total_length=64, max_batch_size=8)
    (completion,) = engine.generate([Request((40, 41), SamplingParams(0.8, 20, seed=3))])
    ids_T = torch.tensor([40, 41, *completion.token_ids])
    with torch.inference_mode():
        logprobs_TV = (model(input_ids=ids_T[None]).logits[0] / 0.8).log_softmax(-1)
    expected = logprobs_TV[:-1].gather(-1, ids_T[1:, None])[1:, 0]
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2),
        NemotronHConfig(
            vocab_size=90,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            hybrid_override_pattern="M*-",
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            max_position_embeddings=64,
        ),
    ],
    ids=["dropout and layers of another name", "layers with a state"],
)
def test_other_architectures_train_on_two_ranks_as_on_one(config: Any, tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", config)
    assert len(decoder_layers(AutoModelForCausalLM.from_pretrained(path))) == config.num_hidden_layers
    one = run_ranks(1, Work(tmp_path / "one", path))
    assert_alike(run_ranks(2, Work(tmp_path / "two", path)), one)


class Rank:
    """An actor's face on a method that answers at once."""

    def __init__(self, **methods: Any) -> None:
        self._methods = methods

    async def call(self, method: str, *arguments: Any) -> Any:
        return self._methods[method](*arguments)


def policy_of(ranks: list[Rank], tensor_parallel_size: int = 1) -> Policy:
    return Policy(
        ranks,  # type: ignore[arg-type]
        ["127.0.0.1"] * len(ranks),
        tensor_parallel_size=tensor_parallel_size,
        micro_batch_tokens=10,
    )


def test_logprobs_come_back_in_the_samples_order_whichever_rank_made_them() -> None:
    def logprobs(micro_batches: Any, of: str) -> Any:
        assert of == "reference"
        return [micro_batch.token_ids_T.numpy() * 1.0 for micro_batch in micro_batches]

    samples = [a_sample(length, 1.0) for length in (3, 9, 2, 7, 1, 5)]
    found = asyncio.run(policy_of([Rank(logprobs=logprobs)] * 4, 2).logprobs(samples, of="reference"))
    assert [each.tolist() for each in found] == [sample.token_ids.tolist() for sample in samples]


def test_a_non_finite_gradient_changes_no_weight_and_names_the_step(model_path: Path, tmp_path: Path) -> None:
    work = Work(tmp_path / "run", model_path, rounds=(ROUNDS[0], (a_sample(4, float("inf")),)))
    found = run_ranks(1, work)
    assert re.fullmatch("in step 2 the gradient's norm is (nan|inf), so no weight was changed", found["error"])
    before = AutoModelForCausalLM.from_pretrained(work.saved / "model").state_dict()
    for name, tensor in before.items():
        assert torch.equal(found["weights"][name], tensor)


def test_a_rank_reports_its_time_and_memory(one_rank: dict[str, Any]) -> None:
    assert one_rank["seconds"].keys() == {"forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in one_rank["seconds"].values())
    assert 0.01 < one_rank["peak_memory_gib"] < 10
