"""Adapters train, the model under them does not, and everybody else sees one ordinary model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from slurmkit.config.section import ValidationError
from slurmkit.errors import UserError
from slurmkit.grpo.causal_lm import check_model
from tests.support.driver import EVERY_STEP, TINY, run, without_times
from tests.support.policy_ranks import ROUNDS, Work, assert_alike, run_ranks
from tests.support.small_models import make_model, tiny_llama
from tests.support.tiny_model import tiny_config

LORA = {"dtensor_cfg": {"lora_cfg": {"enabled": True, "dim": 4, "alpha": 16}}}
KL = {"reference_policy_kl_penalty": 0.01}


def logprobs(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        ids_T = [torch.from_numpy(sample.token_ids).long() for sample in ROUNDS[0]]
        found = []
        for each_T in ids_T:
            logprobs_TV = model(input_ids=each_T[None]).logits[0].log_softmax(-1)
            picked_T = logprobs_TV[:-1].gather(-1, each_T[1:, None])[:, 0]
            found.append(torch.nn.functional.pad(picked_T, (1, 0)))
        return torch.cat(found)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture(scope="module")
def trained(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    work = Work(folder, model_path, LORA, KL, starting_path=model_path, score=("policy", "reference"), reference=True)
    return work.saved, run_ranks(2, work)


def test_adapters_train_and_are_merged_for_engines_and_checkpoints(
    trained: tuple[Path, dict[str, Any]], model_path: Path
) -> None:
    saved, found = trained
    before = AutoModelForCausalLM.from_pretrained(model_path)
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(found["weights"][name], tensor)}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)
    assert found["weights"].keys() == before.state_dict().keys()
    before.load_state_dict(found["weights"])
    torch.testing.assert_close(found["scores"]["policy"], logprobs(before), atol=1e-5, rtol=1e-5)
    opened = AutoModelForCausalLM.from_pretrained(saved / "model")
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), saved / "adapter")
    torch.testing.assert_close(logprobs(opened), logprobs(by_peft), atol=1e-5, rtol=1e-5)


def test_only_adapters_are_in_the_optimiser(trained: tuple[Path, dict[str, Any]]) -> None:
    state = torch.load(trained[0] / "optimizer.pt", weights_only=True)["state"]
    assert state
    assert all(".lora_" in name for name in state)
    assert len(state) == len(load_file(trained[0] / "adapter" / "adapter_model.safetensors"))


def test_with_adapters_off_the_model_is_the_reference(trained: tuple[Path, dict[str, Any]], model_path: Path) -> None:
    scores = trained[1]["scores"]
    torch.testing.assert_close(
        scores["reference"], logprobs(AutoModelForCausalLM.from_pretrained(model_path)), atol=1e-5, rtol=1e-5
    )
    assert (scores["reference"] - scores["policy"]).abs().max() > 1e-2


def test_a_run_with_adapters_goes_on_from_them(
    trained: tuple[Path, dict[str, Any]], model_path: Path, tmp_path: Path
) -> None:
    saved, found = trained
    work = Work(
        tmp_path / "on",
        saved / "model",
        LORA,
        KL,
        starting_path=model_path,
        checkpoint=saved,
        first=len(ROUNDS) - 1,
        reference=True,
    )
    assert_alike(run_ranks(1, work), found)


def test_adapters_of_layers_that_are_stored_transposed_are_merged(tmp_path: Path) -> None:
    shape = GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    path = make_model(tmp_path / "model", shape)
    found = run_ranks(1, Work(tmp_path / "run", path, LORA, starting_path=path, score=("policy",)))
    model = AutoModelForCausalLM.from_pretrained(path)
    before = logprobs(model)
    model.load_state_dict(found["weights"])
    torch.testing.assert_close(found["scores"]["policy"], logprobs(model), atol=1e-5, rtol=1e-5)
    assert (found["scores"]["policy"] - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["query"], "target_modules: .*query.* not found"), (["embed_tokens"], "embed_tokens is of the kind Embedding")],
)
def test_a_target_that_is_not_there_or_not_linear_is_refused(
    targets: list[str], message: str, model_path: Path, tmp_path: Path
) -> None:
    lora = {"enabled": True, "target_modules": targets}
    policy = {"model_name": str(model_path), "from_scratch": None, "dtensor_cfg": {"lora_cfg": lora}}
    with pytest.raises(UserError, match=message):
        check_model(model_path, tiny_config(tmp_path, policy=policy))


def test_adapters_and_tensor_parallel_exclude_each_other(tmp_path: Path) -> None:
    settings = {"tensor_parallel_size": 2, "lora_cfg": {"enabled": True}}
    with pytest.raises(ValidationError, match="adapters are not split, so it must be 1"):
        tiny_config(tmp_path, policy={"dtensor_cfg": settings}, cluster={"gpus_per_node": 2})


def test_the_frozen_model_is_held_in_the_type_that_is_computed_with(model_path: Path, tmp_path: Path) -> None:
    found = run_ranks(2, Work(tmp_path / "run", model_path, LORA | {"precision": "bfloat16"}, starting_path=model_path))
    assert found["norms"][0] > 0
    before = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    embeddings = found["weights"]["model.embed_tokens.weight"]
    assert embeddings.dtype == torch.float32
    assert embeddings.equal(before["model.embed_tokens.weight"].bfloat16().float())


@pytest.mark.ray
def test_a_lora_run_resumes_exactly_and_refuses_another_starting_model(
    tmp_path: Path,
) -> None:
    options = (
        "+policy.dtensor_cfg.lora_cfg={enabled: true, dim: 4, alpha: 16}",
        "+loss_fn.reference_policy_kl_penalty=0.05",
        "grpo.max_num_steps=4",
        "checkpointing.save_period=2",
        *EVERY_STEP,
    )
    whole = run(tmp_path / "whole", TINY, *options)
    assert whole.code == 0, whole.errors
    assert any(value > 0 for value in whole.values("train:kl_penalty"))
    weights = [load_file(whole.folder / name / "model.safetensors") for name in ("model", "step_2/model")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    shutil.copytree(whole.folder, tmp_path / "cut", symlinks=True)
    shutil.rmtree(tmp_path / "cut" / "step_4")
    cut = run(tmp_path / "cut", TINY, *options)
    assert cut.code == 0, cut.errors
    assert "going on after step 2" in cut.output
    assert without_times(cut.folder) == without_times(whole.folder)

    shutil.rmtree(tmp_path / "cut" / "step_4")
    moved = {name: tensor + 1e-3 for name, tensor in weights[0].items()}
    save_file(moved, tmp_path / "cut" / "model" / "model.safetensors", {"format": "pt"})
    other = run(tmp_path / "cut", TINY, *options)
    assert other.code == 2
    assert "cut/model holds other weights than those that" in other.errors
    assert "step_2 was trained beside" in other.errors
