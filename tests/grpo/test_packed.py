"""Packed sequences through a model: what each would give alone. Shapes: T positions, S sequences, V vocabulary."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slurmkit.errors import UserError
from slurmkit.grpo import packed_attention
from slurmkit.grpo.packed_attention import Packing
from slurmkit.grpo.policy_model import PolicyModel
from tests.support.tensor_shapes import LargestTensor

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # So large that attention matters: with the usual 0.02 every token's logprobs would be much alike.
    "initializer_range": 0.3,
}


def a_model(kind: str, **changes: Any) -> Any:
    """A model of transformers with random weights, the same every time. `kind` is a name in the function."""
    torch.manual_seed(5)
    build = {
        "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "Mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "Gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "Cohere": (transformers.CohereConfig, transformers.CohereForCausalLM),
        "Granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
        "FalconH1": (transformers.FalconH1Config, transformers.FalconH1ForCausalLM),
        "Phi": (transformers.PhiConfig, transformers.PhiForCausalLM),
        "Mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "GPT2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "Gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }
    config, model = build[kind]
    return model(config(**(SIZES | changes)))


@functools.cache
def qwen(*, tied: bool = False, double: bool = False) -> PolicyModel:
    model = PolicyModel(a_model("Qwen3", tie_word_embeddings=tied), logprob_chunk_size=7)
    assert model.packs
    return model.double() if double else model


def some_tokens(lengths: Sequence[int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def positions_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def run(
    model: PolicyModel,
    token_ids_T: torch.Tensor,
    lengths: Sequence[int],
    temperature: float = 1.0,
    mask_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return model(token_ids_T, positions_of(lengths), tuple(lengths), temperature, mask_T)  # type: ignore[no-any-return]


def alone(
    model: Any, token_ids_T: torch.Tensor, lengths: Sequence[int], temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' own logits of one sequence after the other, by the plain formulas."""
    logprobs, entropies = [], []
    for ids_T in token_ids_T.split(list(lengths)):
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0] / temperature
        logprobs_TV = logits_TV.log_softmax(-1)[:-1]
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
        picked_T = logprobs_TV.gather(-1, ids_T[1:, None])[:, 0]
        for found, x_T in ((logprobs, picked_T), (entropies, entropy_T)):
            found.append(torch.nn.functional.pad(x_T, (1, 0)))
    return torch.cat(logprobs), torch.cat(entropies)


# Two buckets of rows, sequences of one and of two tokens, and two of the same length.
LENGTHS = (13, 1, 380, 2, 40, 13)


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_is_one_by_one_in_logprobs_entropy_and_every_gradient(kind: str, tied: bool) -> None:
    token_ids_T = some_tokens(LENGTHS)
    assert len(Packing(LENGTHS, token_ids_T.device).buckets) == 2
    factors_T = torch.randn(len(token_ids_T), generator=torch.Generator().manual_seed(1)) / len(token_ids_T)
    gradients, values = [], []
    for compute in ("alone", "packed"):
        model = a_model(kind, tie_word_embeddings=tied)
        if compute == "alone":
            logprobs_T, entropy_T = alone(model, token_ids_T, LENGTHS, 0.7)
        else:
            wrapped = PolicyModel(model)
            assert wrapped.packs
            logprobs_T, entropy_T = run(wrapped, token_ids_T, LENGTHS, 0.7)
            assert logprobs_T.dtype == entropy_T.dtype == torch.float32
        torch.autograd.backward((logprobs_T * factors_T).sum() + (entropy_T * factors_T).sum())
        values.append((logprobs_T, entropy_T))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for expected, found in zip(*values, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4, msg=name)


@settings(deadline=None, max_examples=25)
@given(some.lists(some.integers(1, 30), min_size=1, max_size=9), some.sampled_from([0, 64, 1 << 17]))
def test_what_a_sequence_is_packed_with_changes_nothing_in_float64(lengths: list[int], wasted: int) -> None:
    model = qwen(double=True)
    token_ids_T = some_tokens(lengths, len(lengths))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(packed_attention, "_WASTED_SCORES", wasted)
        together = run(model, token_ids_T, lengths)
        singly = [run(model, ids_T, [len(ids_T)]) for ids_T in token_ids_T.split(lengths)]
    for kind in (0, 1):
        assert together[kind].dtype == torch.float64
        torch.testing.assert_close(together[kind], torch.cat([each[kind] for each in singly]), atol=1e-12, rtol=1e-12)


def test_a_token_affects_only_later_tokens_of_its_own_sequence() -> None:
    lengths = (9, 14, 6)
    token_ids_T = some_tokens(lengths)
    changed_T = token_ids_T.clone()
    changed_T[13] = (changed_T[13] + 1) % VOCABULARY  # position 4 of the second sequence
    mask_T = torch.ones(29, dtype=torch.bool)
    mask_T[13] = False  # as a tool's token: not trained, and seen all the same
    with torch.no_grad():
        before_T, after_T = (run(qwen(), ids_T, lengths, mask_T=mask_T)[0] for ids_T in (token_ids_T, changed_T))
    same_T = before_T == after_T
    assert same_T[:14].all()
    assert not same_T[14:23].any()
    assert same_T[23:].all()
    assert before_T[13] == 0


def test_packed_is_padded_on_the_right() -> None:
    lengths = (9, 14, 6)
    token_ids_T = some_tokens(lengths)
    padded_ST = torch.nn.utils.rnn.pad_sequence(list(token_ids_T.split(lengths)), batch_first=True)
    attended_ST = torch.arange(14) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        logits_STV = a_model("Qwen3")(input_ids=padded_ST, attention_mask=attended_ST.long()).logits
        picked_ST = logits_STV.log_softmax(-1)[:, :-1].gather(-1, padded_ST[:, 1:, None])[..., 0]
        found_T, _ = run(qwen(), token_ids_T, lengths)
    torch.testing.assert_close(found_T, torch.nn.functional.pad(picked_ST, (1, 0))[attended_ST], atol=1e-5, rtol=1e-5)


def test_a_tokens_logprob_comes_from_the_token_before_it() -> None:
    # Attention and feed-forward give nothing, and embeddings are unit vectors: the head is a table of next tokens.
    model = a_model("Qwen3", num_hidden_layers=1, hidden_size=64, tie_word_embeddings=False)
    table_VV = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, 64))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :VOCABULARY] = table_VV.T / 64**0.5  # undoing the final norm
        found_T, _ = run(PolicyModel(model), torch.tensor([3, 9, 4, 50, 50]), (3, 2), 0.5)
    next_VV = (table_VV / 0.5).log_softmax(-1)
    expected_T = torch.stack([torch.tensor(0.0), next_VV[3, 9], next_VV[9, 4], torch.tensor(0.0), next_VV[50, 50]])
    torch.testing.assert_close(found_T, expected_T, atol=1e-5, rtol=1e-4)


def test_only_positions_of_the_mask_are_computed_and_they_are_the_same() -> None:
    lengths = (9, 14, 1, 6)
    token_ids_T = some_tokens(lengths)
    mask_T = torch.rand(30, generator=torch.Generator().manual_seed(2)) < 0.4
    whole = run(qwen(), token_ids_T, lengths)
    part = run(qwen(), token_ids_T, lengths, mask_T=mask_T)
    for whole_T, part_T in zip(whole, part, strict=True):
        torch.testing.assert_close(part_T, torch.where(mask_T, whole_T, 0.0), atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(x_T[mask_T].sum(), qwen().model.lm_head.weight) for x_T in (whole[0], part[0])]
    torch.testing.assert_close(*(gradient for (gradient,) in gradients), atol=1e-5, rtol=1e-5)


def test_where_nothing_counts_there_is_a_graph_whose_gradients_are_zero() -> None:
    model = PolicyModel(a_model("Qwen3"))
    logprobs_T, entropy_T = run(model, torch.zeros(1, dtype=torch.long), (1,), mask_T=torch.zeros(1, dtype=torch.bool))
    torch.autograd.backward(logprobs_T.sum() + entropy_T.sum())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "noise"),
    [("Qwen3", {"attention_dropout": 0.5}), ("GPT2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5})],
)
def test_dropout_stays_off_while_training(kind: str, noise: dict[str, float]) -> None:
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2} if kind == "GPT2" else {}
    model = PolicyModel(a_model(kind, **sizes, **noise)).train()
    lengths = (9, 14, 6)
    token_ids_T = some_tokens(lengths)
    first_T, second_T = (run(model, token_ids_T, lengths)[0] for _ in range(2))
    assert first_T.requires_grad
    assert torch.equal(first_T, second_T)
    expected_T, _ = alone(a_model(kind, **sizes, **noise).eval(), token_ids_T, lengths)
    torch.testing.assert_close(first_T, expected_T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "packs"),
    [
        ("Mistral", {"sliding_window": 4}, True),
        ("Cohere", {"logit_scale": 0.25}, True),
        ("Granite", {"logits_scaling": 8.0}, True),
        ("Gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "sliding_window": 4}, False),
        ("Mamba", {"state_size": 8, "num_hidden_layers": 2}, False),
    ],
)
def test_models_with_windows_softcaps_or_state_give_their_own_logprobs(
    kind: str, changes: dict[str, Any], packs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = (9, 14, 1, 6)
    token_ids_T = some_tokens(lengths)
    expected = alone(a_model(kind, **changes).eval(), token_ids_T, lengths, 0.7)
    model = PolicyModel(a_model(kind, **changes))
    assert model.packs == packs
    assert ("takes one sequence at a time, as" in capsys.readouterr().out) == (not packs)
    for found_T, expected_T in zip(run(model, token_ids_T, lengths, 0.7), expected, strict=True):
        torch.testing.assert_close(found_T, expected_T, atol=1e-5, rtol=1e-4)


# The model's original context, and lengths on both sides of it and at it, the long ones first.
CONTEXT = 16
AROUND = (40, 9, CONTEXT, 24, 1, CONTEXT + 1, 24, 5)
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "short_factor": [1.0, 1.2, 1.4, 1.6],
        "long_factor": [1.0, 4.0, 8.0, 16.0],
    },
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def a_scaled_model(kind: str, *ropes: str) -> Any:
    """A model with these types of RoPE: one for all layers, or one for each kind of layer."""
    found = [{"rope_type": rope, "rope_theta": 100.0, **SCALED[rope]} for rope in ropes]
    layers = ["sliding_attention", "full_attention"]
    parameters = found[0] if len(found) == 1 else dict(zip(layers, found, strict=True))
    more = {} if len(found) == 1 else {"layer_types": layers, "sliding_window": 8}
    return a_model(kind, max_position_embeddings=CONTEXT, rope_parameters=parameters, **more)


def freshly(kind: str, *ropes: str, lengths: Sequence[int] = AROUND) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each sequence by a model of its own: transformers keeps the frequencies of the longest sequence so far."""
    parts = some_tokens(lengths).split(list(lengths))
    return [alone(a_scaled_model(kind, *ropes).eval(), ids_T, [len(ids_T)]) for ids_T in parts]


def test_every_type_of_rope_in_transformers_is_tried_here() -> None:
    assert SCALED.keys() == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize(
    ("kind", "ropes"),
    [
        *(("Llama", (rope,)) for rope in SCALED),
        *(("Gemma3", ("default", rope)) for rope in SCALED),
        ("Gemma3", ("dynamic", "longrope")),
    ],
    ids=str,
)
def test_lengths_around_the_original_context_are_packed_as_alone(kind: str, ropes: tuple[str, ...]) -> None:
    token_ids_T = some_tokens(AROUND)
    singly = freshly(kind, *ropes)
    model = PolicyModel(a_scaled_model(kind, *ropes))
    assert model.packs
    for _ in range(2):
        for found_T, expected in zip(run(model, token_ids_T, AROUND), zip(*singly, strict=True), strict=True):
            torch.testing.assert_close(found_T, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_a_model_that_takes_one_sequence_at_a_time_forgets_the_longest() -> None:
    lengths = (40, 24, 9)  # transformers itself forgets the longest before a sequence within the original context only
    singly = freshly("Llama", "dynamic", lengths=lengths)
    model = PolicyModel(a_scaled_model("Llama", "dynamic"), packs=False)
    for found_T, expected in zip(run(model, some_tokens(lengths), lengths), zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(found_T, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_a_type_of_rope_that_nobody_knows_is_seen_when_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slurmkit.grpo.rope._ropes", lambda config: [{"original_max_position_embeddings": CONTEXT}])
    for rope in ("dynamic", "longrope"):
        assert not PolicyModel(a_scaled_model("Llama", rope)).packs
        assert "as a sequence differs beside one beyond the model's original context" in capsys.readouterr().out
    assert PolicyModel(a_scaled_model("Llama", "yarn")).packs


def test_a_model_that_does_more_to_its_logits_is_refused_by_name() -> None:
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "lm_head_multiplier": 0.25}
    with pytest.raises(UserError, match="logits of FalconH1ForCausalLM are not its output head times its hidden"):
        PolicyModel(a_model("FalconH1", **sizes))


def test_a_head_that_is_more_than_a_matrix_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"PhiForCausalLM has Linear.*bias=True"):
        PolicyModel(a_model("Phi"))


def test_neither_all_logits_nor_a_mask_over_all_positions_ever_exist() -> None:
    lengths = [40] * 20 + [60] * 20
    model = PolicyModel(a_model("Qwen3", vocab_size=3000, num_hidden_layers=1), logprob_chunk_size=50)
    with LargestTensor() as watch:
        logprobs_T, entropy_T = run(model, some_tokens(lengths), lengths)
        torch.autograd.backward(logprobs_T.sum() + entropy_T.sum())
    # 2,000 positions: a mask has 4 million entries, all logits 6 million. A chunk of logits:
    assert watch.largest == 50 * 3000


@given(some.lists(some.integers(1, 2000), min_size=1, max_size=40))
def test_attention_works_on_hardly_more_than_the_squares_of_the_lengths(lengths: list[int]) -> None:
    buckets = Packing(tuple(lengths), torch.device("cpu")).buckets
    assert sum(rows for rows, _ in buckets) == len(lengths)
    scores = sum(rows * length**2 for rows, length in buckets)
    squares = sum(length**2 for length in lengths)
    assert squares <= scores <= squares + len(buckets) * (1 << 17)
    # Another bucket only where it saves more than that.
    assert (len(buckets) - 1) * (1 << 17) <= len(lengths) * max(lengths) ** 2


@settings(deadline=None, max_examples=30)
@given(some.lists(some.integers(1, 30), min_size=1, max_size=9))
def test_flash_attention_receives_sequence_starts_and_window_sizes(lengths: list[int]) -> None:
    """torch's kernel, which only CUDA has, played by its documented meaning."""
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(sum(lengths), heads, 8, generator=random).requires_grad_() for heads in (4, 2, 2)]
    factors_THD = torch.randn(sum(lengths), 4, 8, generator=random)

    def kernel(query: Any, key: Any, value: Any, starts: Any, key_starts: Any, longest: int, longest_key: int, *,
               scale: float, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:  # fmt: skip
        assert starts is key_starts
        assert starts.dtype == torch.int32
        assert longest == longest_key == max(lengths)
        assert starts.tolist() == [0, *numpy.cumsum(lengths)]
        left, right = window_size
        results = []
        for first, last in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            parts = (x[first:last].transpose(0, 1) for x in (query, key, value))
            distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
            seen = (distance >= -right) & ((distance <= left) if left >= 0 else True)
            mixed = torch.nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )
            results.append(mixed.transpose(0, 1))
        return torch.cat(results)

    packing = Packing(tuple(lengths), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "varlen_attn", kernel)
        for window in (None, 3):
            flash_THD, rows_THD = (
                attend(*tensors, packing, 0.3, window) for attend in (packed_attention._flash, packed_attention._rows)
            )
            torch.testing.assert_close(flash_THD, rows_THD)
            # With a gradient at the last tokens too, which stand in the rows' padding.
            gradients = [torch.autograd.grad((x_THD * factors_THD).sum(), tensors) for x_THD in (flash_THD, rows_THD)]
            torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


# For three sequences and for one; the second rank has to pass through the layers as often as the first: three times
# for one at a time, twice for what is within and beyond the original context.
SHARES = [(9, CONTEXT + 3, 6), (5,)]


def a_sharded_kind(kind: str) -> Any:
    return a_model("Mamba", state_size=8) if kind == "Mamba" else a_scaled_model("Llama", kind)


def one_rank(rank: int, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    model = PolicyModel(a_sharded_kind(kind))
    for layer in model._decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    logprobs_T, _ = run(model, some_tokens(SHARES[rank], rank), SHARES[rank])
    torch.autograd.backward(logprobs_T.sum() * 2)  # FSDP takes the mean over ranks
    gradients: dict[str, Any] = {name: each.grad for name, each in model.model.named_parameters()}
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    if rank == 0:
        torch.save(whole, folder / "gradients.pt")
    distributed.destroy_process_group()


def rank_of_its_own(rank: int, folder: Path, kind: str) -> None:
    one_rank(rank, folder, kind)
    # Threads of gloo, which FSDP's groups still hold, now and then abort the interpreter as it ends.
    os._exit(0)


@pytest.mark.parametrize("kind", ["Mamba", "dynamic", "longrope"])
def test_ranks_pass_equally_often_through_sharded_layers(tmp_path: Path, kind: str) -> None:
    other = multiprocessing.get_context("spawn").Process(target=rank_of_its_own, args=(1, tmp_path, kind))
    other.start()
    try:
        one_rank(0, tmp_path, kind)
        other.join(timeout=60)
        assert other.exitcode == 0
    finally:
        other.kill()
    model = a_sharded_kind(kind)
    for rank, lengths in enumerate(SHARES):
        torch.autograd.backward(alone(model, some_tokens(lengths, rank), lengths)[0].sum())
    for name, found in torch.load(tmp_path / "gradients.pt").items():
        torch.testing.assert_close(found, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4, msg=name)
