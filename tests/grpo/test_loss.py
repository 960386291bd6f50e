"""The loss as a formula. Shapes: B sequences, T positions, V vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from slurmkit.grpo.loss import LossSums, clipped_policy_loss, token_logprobs


def compute(
    logprobs: torch.Tensor,
    sampled: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    num_valid_tokens: int | None = None,
) -> tuple[torch.Tensor, LossSums]:
    valid = int(mask.sum()) if num_valid_tokens is None else num_valid_tokens
    return clipped_policy_loss(logprobs, sampled, advantages, mask, num_valid_tokens=valid, clip_min=0.2, clip_max=0.3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.2, 1.0, -1.2, 0),
        (1.5, 1.0, -1.3, 1),  # above the upper bound, and would gain from going on
        (0.5, 1.0, -0.5, 0),  # too low already: clipping would only hide that
        (0.5, -1.0, 0.8, 1),  # below the lower bound
        (1.5, -1.0, 1.5, 0),
    ],
)
def test_one_token_has_the_clipped_surrogate_as_its_loss(
    ratio: float, advantage: float, loss: float, clipped: int
) -> None:
    value, sums = compute(
        torch.tensor([[math.log(ratio) - 1.0]]),
        torch.tensor([[-1.0]]),
        torch.tensor([[advantage]]),
        torch.ones(1, 1),
    )
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert sums.clipped == clipped
    assert sums.ratio == pytest.approx(ratio, abs=1e-6)
    assert sums.approximate_kl == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)
    assert sums.probability_error == pytest.approx(max(ratio, 1 / ratio), abs=1e-6)


def a_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logprobs_BT = -torch.rand(8, 6)
    mask_BT = (torch.rand(8, 6) < 0.6).long()
    return logprobs_BT, logprobs_BT + 0.3 * torch.randn(8, 6), torch.randn(8, 6), mask_BT


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_loss_gradient_and_metrics_do_not_depend_on_the_split_into_micro_batches(size: int) -> None:
    logprobs_BT, sampled_BT, advantages_BT, mask_BT = a_batch()
    whole_BT = logprobs_BT.clone().requires_grad_()
    whole, whole_sums = compute(whole_BT, sampled_BT, advantages_BT, mask_BT)
    whole.backward()

    parts_BT = logprobs_BT.clone().requires_grad_()
    total, sums = 0.0, LossSums(0, 0, 0, 0, 0)
    for rows in torch.arange(8).split(size):
        loss, part = compute(parts_BT[rows], sampled_BT[rows], advantages_BT[rows], mask_BT[rows], int(mask_BT.sum()))
        loss.backward()
        total, sums = total + loss.item(), sums + part
    assert total == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(parts_BT.grad, whole_BT.grad)
    assert sums.ratio == pytest.approx(whole_sums.ratio, abs=1e-5)
    assert sums.clipped == whole_sums.clipped


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("inf"), float("nan")])
def test_what_stands_behind_the_mask_never_matters(garbage: float) -> None:
    logprobs_BT, sampled_BT, advantages_BT, mask_BT = a_batch()
    clean_BT = logprobs_BT.clone().requires_grad_()
    clean, clean_sums = compute(clean_BT, sampled_BT, advantages_BT, mask_BT)
    clean.backward()

    hidden_BT = mask_BT == 0
    dirty_BT = logprobs_BT.masked_fill(hidden_BT, garbage).requires_grad_()
    dirty, dirty_sums = compute(
        dirty_BT,
        sampled_BT.masked_fill(hidden_BT, garbage),
        advantages_BT.masked_fill(hidden_BT, garbage),
        mask_BT,
    )
    dirty.backward()
    assert dirty.item() == clean.item()
    assert dirty_sums == clean_sums
    assert clean_BT.grad is not None
    assert dirty_BT.grad is not None
    torch.testing.assert_close(dirty_BT.grad, clean_BT.grad)
    assert not dirty_BT.grad[hidden_BT].any()


@pytest.mark.parametrize("difference", [100.0, -100.0, 1e6])
def test_extreme_ratios_give_a_finite_loss_and_gradient(difference: float) -> None:
    logprobs_BT = torch.full((1, 2), -1.0, requires_grad=True)
    loss, sums = compute(
        logprobs_BT, torch.full((1, 2), -1.0 - difference), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert logprobs_BT.grad is not None
    assert torch.isfinite(logprobs_BT.grad).all()
    assert math.isfinite(sums.approximate_kl)


def test_a_micro_batch_without_a_trained_token_still_has_a_graph() -> None:
    logprobs_BT = torch.zeros(1, 3, requires_grad=True)
    loss, _ = compute(logprobs_BT, torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), num_valid_tokens=7)
    loss.backward()
    assert loss.item() == 0
    assert logprobs_BT.grad is not None


def test_token_logprobs_are_those_of_the_next_token_under_the_temperature() -> None:
    torch.manual_seed(0)
    logits_BTV, ids_BT = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    logprobs_BT = token_logprobs(logits_BTV, ids_BT, temperature=0.6)
    assert not logprobs_BT[:, 0].any()
    for b in range(2):
        for t in range(1, 5):
            expected = torch.log_softmax(logits_BTV[b, t - 1] / 0.6, -1)[ids_BT[b, t]]
            assert logprobs_BT[b, t].item() == pytest.approx(expected.item(), abs=1e-6)
