"""From samples to micro-batches on ranks."""

from __future__ import annotations

import pytest

from slurmkit.grpo.batch import optimizer_steps
from slurmkit.rollout.sample import Sample


def a_sample(length: int, advantage: float, mark: int = 7) -> Sample:
    return Sample(
        token_ids=(1, *[mark] * length),
        loss_mask=(0, *[1] * length),
        logprobs=(0.0, *[-0.5] * length),
        advantage=(0.0, *[advantage] * length),
        group_id=0,
        rollout_id=mark,
        temperature=1.0,
        weight_version=0,
        finish_reason="stop",
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_every_sample_is_trained_on_once_and_ranks_have_equally_many_micro_batches(
    num_ranks: int, micro_batch_size: int
) -> None:
    samples = [a_sample(length, 1.0, mark=10 + length) for length in (3, 1, 4, 2, 6)]
    (step,) = optimizer_steps(samples, global_batch_size=5, micro_batch_size=micro_batch_size, num_ranks=num_ranks)
    assert len({len(micro_batches) for micro_batches in step.ranks}) == 1
    marks = [
        int(row[1])
        for micro_batches in step.ranks
        for micro_batch in micro_batches
        for row, mask in zip(micro_batch.token_ids_BT, micro_batch.mask_BT, strict=True)
        if mask.any()
    ]
    assert sorted(marks) == [11, 12, 13, 14, 16]
    assert step.num_valid_tokens == 16


def test_samples_without_advantage_are_counted_in_the_denominator_and_not_computed() -> None:
    samples = [a_sample(2, 1.0), a_sample(5, 0.0), a_sample(3, -1.0)]
    (step,) = optimizer_steps(samples, global_batch_size=3, micro_batch_size=8, num_ranks=1)
    assert step.ranks[0][0].token_ids_BT.shape == (2, 4)
    assert step.num_valid_tokens == 10
    assert step.num_trained_tokens == 5


def test_an_optimiser_step_in_which_nothing_can_be_learned_is_left_out() -> None:
    samples = [a_sample(2, 0.0)] * 2 + [a_sample(2, 1.0)] * 2
    steps = optimizer_steps(samples, global_batch_size=2, micro_batch_size=2, num_ranks=1)
    assert len(steps) == 1
    assert optimizer_steps(samples[:2], global_batch_size=2, micro_batch_size=2, num_ranks=1) == []


def test_padding_is_neither_attended_nor_trained_on() -> None:
    samples = [a_sample(1, 1.0), a_sample(3, 1.0)]
    (step,) = optimizer_steps(samples, global_batch_size=2, micro_batch_size=2, num_ranks=1)
    (micro_batch,) = step.ranks[0]
    assert micro_batch.attended_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert micro_batch.mask_BT.tolist() == [[0, 1, 0, 0], [0, 1, 1, 1]]
