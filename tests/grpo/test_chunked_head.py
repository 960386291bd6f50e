"""Logprobs and entropy in chunks: the plain formulas' values and gradients, without the plain formulas' memory.

Shapes: T positions, M of them whose successors' logprobs are wanted, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from slurmkit.grpo.chunked_head import LogitsForm, chunked_logprobs
from tests.support.tensor_shapes import LargestTensor

FORMS = [
    LogitsForm(),
    LogitsForm(temperature=0.6),
    LogitsForm(scale=0.25),
    LogitsForm(2.0, softcap=3.0, temperature=1.5),
]


def plain(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    positions_M: torch.Tensor,
    target_ids_M: torch.Tensor,
    form: LogitsForm,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_MV = hidden_TD[positions_M] @ weight_VD.T * form.scale
    if form.softcap is not None:
        logits_MV = form.softcap * torch.tanh(logits_MV / form.softcap)
    logprobs_MV = (logits_MV / form.temperature).log_softmax(-1)
    entropy_M = -(logprobs_MV.exp() * logprobs_MV).sum(-1)
    return logprobs_MV.gather(-1, target_ids_M[:, None])[:, 0], entropy_M


def some_tensors(
    positions: int = 11, width: int = 5, vocabulary: int = 17, kind: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of twice as many hidden states as positions, in disorder."""
    random = torch.Generator().manual_seed(positions)
    hidden_TD = torch.randn(2 * positions, width, generator=random, dtype=torch.float64).to(kind).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, generator=random, dtype=torch.float64).to(kind).requires_grad_()
    positions_M = torch.randperm(2 * positions, generator=random)[:positions]
    return hidden_TD, weight_VD, positions_M, torch.randint(0, vocabulary, (positions,), generator=random)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_values_and_gradients_are_those_of_the_plain_formulas(form: LogitsForm, chunk_size: int | None) -> None:
    tensors = some_tensors()
    factors_M = torch.linspace(-2, 3, 11, dtype=torch.float64)
    found = chunked_logprobs(*tensors, form, chunk_size=chunk_size)
    expected = plain(*tensors, form)
    for found_M, expected_M in zip(found, expected, strict=True):
        torch.testing.assert_close(found_M, expected_M, atol=1e-12, rtol=1e-12)
    # The logprobs alone, the entropy alone, and both.
    for logprob_factor, entropy_factor in ((1, None), (None, 1), (1, 0.7)):

        def loss(logprobs_M: Any, entropy_M: Any, left: Any = logprob_factor, right: Any = entropy_factor) -> Any:
            parts = [
                factor * (factors_M * x_M).sum() for factor, x_M in ((left, logprobs_M), (right, entropy_M)) if factor
            ]
            return torch.stack(parts).sum()

        gradients = [torch.autograd.grad(loss(*each), tensors[:2], retain_graph=True) for each in (found, expected)]
        for found_gradient, expected_gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(found_gradient, expected_gradient, atol=1e-11, rtol=1e-11)


def test_gradients_are_the_limits_of_differences() -> None:
    hidden_TD, weight_VD, positions_M, target_ids_M = some_tensors(3, 2, 4)
    form = LogitsForm(0.5, softcap=2.0, temperature=0.8)

    def function(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> Any:
        return chunked_logprobs(hidden_TD, weight_VD, positions_M, target_ids_M, form, chunk_size=2)

    assert gradcheck(function, (hidden_TD, weight_VD))


def test_a_weight_in_bfloat16_has_its_gradient_added_up_in_float32() -> None:
    # 2,000 contributions alike in sign, one chunk each: bfloat16 would stop growing after some 256 of them.
    hidden_TD, weight_VD, positions_M, _ = some_tensors(2000, 4, 3, torch.bfloat16)
    with torch.no_grad():
        hidden_TD.abs_()
    target_ids_M = torch.zeros(2000, dtype=torch.long)
    gradients = []
    for chunk_size, convert in ((1, torch.bfloat16), (None, torch.float64)):
        tensors = (hidden_TD.detach().to(convert), weight_VD.detach().to(convert).requires_grad_())
        logprobs_M, _ = chunked_logprobs(*tensors, positions_M, target_ids_M, chunk_size=chunk_size)
        assert logprobs_M.dtype == torch.promote_types(convert, torch.float32)
        gradients.append(torch.autograd.grad(logprobs_M.sum(), tensors[1])[0])
    assert gradients[0].dtype == torch.bfloat16
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=0.01, atol=1)


def test_a_frozen_head_gets_no_gradient_and_costs_no_memory_for_one() -> None:
    hidden_TD, weight_VD, *others = some_tensors(3, 2, 1000)
    with LargestTensor() as watch:
        chunked_logprobs(hidden_TD, weight_VD.detach(), *others, chunk_size=1)[0].sum().backward()
    assert hidden_TD.grad is not None
    assert watch.largest <= 1000


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_logits_however_large_give_finite_gradients(size: float) -> None:
    hidden_TD = torch.tensor([[size], [-size], [0.0]], requires_grad=True)
    weight_VD = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logprobs_M, entropy_M = chunked_logprobs(hidden_TD, weight_VD, torch.arange(3), torch.tensor([0, 0, 0]))
    assert logprobs_M[0] == 0
    assert logprobs_M[1].item() == pytest.approx(-2 * size)
    torch.autograd.backward(logprobs_M.sum() + entropy_M.sum())
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.isfinite().all()
    assert weight_VD.grad is not None
    assert weight_VD.grad.isfinite().all()


def test_without_a_position_there_is_a_graph_whose_gradients_are_zero() -> None:
    hidden_TD, weight_VD, positions_M, target_ids_M = some_tensors()
    logprobs_M, entropy_M = chunked_logprobs(hidden_TD, weight_VD, positions_M[:0], target_ids_M[:0])
    torch.autograd.backward(logprobs_M.sum() + entropy_M.sum())
    for tensor in (hidden_TD, weight_VD):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("vocabulary", [32_000, 152_000])
def test_memory_does_not_grow_with_vocabulary_times_tokens(vocabulary: int) -> None:
    tensors = some_tensors(2**24 // vocabulary, 2, vocabulary, torch.float32)
    with LargestTensor() as watch:
        logprobs_M, entropy_M = chunked_logprobs(*tensors)
        torch.autograd.backward(logprobs_M.sum() + entropy_M.sum())
    assert 2**22 < watch.largest <= 2**23  # the logits of all positions would be 2**24
