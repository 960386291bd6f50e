"""Group advantages against closed forms and the vectors that NeMo RL's own function gives."""

from __future__ import annotations

import pytest

from slurmkit.grpo.advantage import group_advantages

# (right answers, group size, leave-one-out, first advantage, last advantage): shared/research/nemo-rl.md 3.2
VECTORS = [
    (1, 16, True, 1.0, -0.2582),
    (2, 16, True, 3.6148, -0.3789),
    (15, 16, True, 0.2582, -1.0),
    (1, 2, True, 1.0, -1.0),
    (1, 4, True, 1.0, -0.5773),
    (1, 16, False, 3.75, -0.25),
    (2, 16, False, 2.5617, -0.366),
    (15, 16, False, 0.25, -3.75),
    (1, 2, False, 0.7071, -0.7071),
    (1, 4, False, 1.5, -0.5),
]


@pytest.mark.parametrize(("right", "size", "leave_one_out", "first", "last"), VECTORS)
def test_normalised_advantages_are_those_of_nemo_rl(
    right: int, size: int, leave_one_out: bool, first: float, last: float
) -> None:
    rewards = [1.0] * right + [0.0] * (size - right)
    advantages = group_advantages(rewards, normalize=True, leave_one_out=leave_one_out)
    assert advantages[0] == pytest.approx(first, abs=1e-4)
    assert advantages[-1] == pytest.approx(last, abs=1e-4)


def test_without_normalisation_the_advantage_is_the_distance_from_the_mean() -> None:
    assert group_advantages([3.0, 1.0, 2.0], normalize=False, leave_one_out=False) == [1.0, -1.0, 0.0]


def test_leave_one_out_scales_the_distance_from_the_mean_by_n_over_n_minus_1() -> None:
    rewards = [3.0, 1.0, 2.0, 6.0]
    plain = group_advantages(rewards, normalize=False, leave_one_out=False)
    leave_one_out = group_advantages(rewards, normalize=False, leave_one_out=True)
    assert leave_one_out == pytest.approx([advantage * 4 / 3 for advantage in plain])


@pytest.mark.parametrize("rewards", [[], [1.0], [0.0, 0.0, 0.0], [0.3] * 7])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_a_group_that_cannot_be_compared_has_no_advantage(rewards: list[float], leave_one_out: bool) -> None:
    advantages = group_advantages(rewards, normalize=True, leave_one_out=leave_one_out)
    assert advantages == [0.0] * len(rewards)
