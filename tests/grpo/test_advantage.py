"""Group advantages against closed forms and the vectors that NeMo RL's own function gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slurmkit.config.algorithm import Grpo
from slurmkit.config.section import ValidationError
from slurmkit.grpo.advantage import advantages, group_advantages

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
    found = group_advantages(rewards, normalize=True, leave_one_out=leave_one_out)
    assert found[0] == pytest.approx(first, abs=1e-4)  # as many digits as the vectors have
    assert found[-1] == pytest.approx(last, abs=1e-4)


@pytest.mark.parametrize("right", [1, 2, 7, 15])
def test_normalised_advantages_of_right_and_wrong_are_their_closed_form(right: int) -> None:
    """In closed form, with k right of n: the unbiased variance of 0s and 1s is k (n − k) / (n (n − 1))."""
    n, mean = 16, right / 16
    std = math.sqrt(right * (n - right) / (n * (n - 1)))
    found = group_advantages([1.0] * right + [0.0] * (n - right), normalize=True, leave_one_out=False)
    assert found[0] == pytest.approx((1 - mean) / (std + 1e-6), abs=1e-6)
    assert found[-1] == pytest.approx(-mean / (std + 1e-6), abs=1e-6)
    others = [
        (right - 1, 1.0),
        (right, 0.0),
    ]  # how many of the 15 others are right, for a right one and for a wrong one
    found = group_advantages([1.0] * right + [0.0] * (n - right), normalize=True, leave_one_out=True)
    for advantage, (count, reward) in zip((found[0], found[-1]), others, strict=True):
        std = math.sqrt(count * (15 - count) / (15 * 14))
        assert advantage == pytest.approx((reward - count / 15) / ((std + 1e-6) if std else 1), abs=1e-6)


def test_unbiased_deviation_scales_advantages_by_sqrt_of_n_minus_1_over_n() -> None:
    rewards = torch.tensor([3.0, 1.0, 2.0, 6.0], dtype=torch.float64)
    biased = (rewards - rewards.mean()) / (rewards.std(correction=0))
    found = group_advantages(rewards.tolist(), normalize=True, leave_one_out=False)
    assert found == pytest.approx((biased * math.sqrt(3 / 4)).tolist(), abs=1e-5)


def test_without_normalisation_the_advantage_is_the_distance_from_the_mean() -> None:
    assert group_advantages([3.0, 1.0, 2.0], normalize=False, leave_one_out=False) == [1.0, -1.0, 0.0]


def test_leave_one_out_scales_advantages_by_n_over_n_minus_1() -> None:
    rewards = [3.0, 1.0, 2.0, 6.0]
    plain = group_advantages(rewards, normalize=False, leave_one_out=False)
    leave_one_out = group_advantages(rewards, normalize=False, leave_one_out=True)
    assert leave_one_out == pytest.approx([advantage * 4 / 3 for advantage in plain])


@pytest.mark.parametrize("rewards", [[], [1.0], [0.0, 0.0, 0.0], [0.3] * 7])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_a_group_that_cannot_be_compared_has_no_advantage(rewards: list[float], leave_one_out: bool) -> None:
    found = group_advantages(rewards, normalize=True, leave_one_out=leave_one_out)
    assert found == [0.0] * len(rewards)


def estimator(name: str, **values: Any) -> Grpo:
    return Grpo(adv_estimator={"name": name, **values})  # type: ignore[arg-type]


def estimate(groups: list[list[float]], grpo: Grpo, tokens: list[list[int]] | None = None) -> list[list[float]]:
    return advantages(groups, tokens or [[1] * len(group) for group in groups], grpo)


def test_rloo_is_the_reward_less_the_mean_of_the_others() -> None:
    rloo = Grpo(normalize_rewards=False, use_leave_one_out_baseline=True)
    assert estimate([[3.0, 1.0, 2.0], [0.0, 4.0]], rloo) == [[1.5, -1.5, 0.0], [-4.0, 4.0]]


def test_maxrl_divides_by_the_mean_and_gives_0_if_all_or_none_are_right() -> None:
    groups = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4, [1.0], [-1.0, 1.0, -3.0], []]
    found = estimate(groups, estimator("maxrl"))
    assert found[:2] == [[3.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]
    assert found[2:] == [[0.0] * 4, [0.0] * 4, [0.0], [0.0] * 3, []]


@pytest.mark.parametrize("minus_baseline", [True, False])
def test_reinforce_plus_plus_has_mean_0_and_deviation_1_over_step_tokens(minus_baseline: bool) -> None:
    """NeMo RL's formula: rewards, or their distance from the group's mean, repeated on every token and whitened."""
    groups, tokens = [[1.0, 0.0, 0.0], [2.0, 5.0]], [[4, 1, 2], [3, 7]]
    found = estimate(groups, estimator("reinforce_plus_plus", minus_baseline=minus_baseline), tokens)
    distances = [reward - (sum(group) / len(group) if minus_baseline else 0.0) for group in groups for reward in group]
    on_tokens = torch.tensor(distances, dtype=torch.float64).repeat_interleave(torch.tensor([4, 1, 2, 3, 7]))
    white = (on_tokens - on_tokens.mean()) / on_tokens.std(correction=0)
    flat = torch.tensor([each for group in found for each in group], dtype=torch.float64)
    torch.testing.assert_close(flat.repeat_interleave(torch.tensor([4, 1, 2, 3, 7])), white, atol=1e-6, rtol=0)


def test_reinforce_plus_plus_with_baseline_gives_0_to_equal_rewards() -> None:
    groups, tokens = [[1.0, 0.0], [1.0, 1.0], [1.0], []], [[9, 1], [2, 2], [2], []]
    found = estimate(groups, estimator("reinforce_plus_plus"), tokens)
    assert found[0][0] > 0 > found[0][1]
    assert found[1:] == [[0.0, 0.0], [0.0], []]
    without = estimate(groups, estimator("reinforce_plus_plus", minus_baseline=False), tokens)
    assert without[1][0] == without[2][0] == without[0][0] > 0


@pytest.mark.parametrize("groups", [[], [[]], [[0.1]], [[0.1] * 3, [0.1] * 4]])
@pytest.mark.parametrize("name", ["grpo", "maxrl", "reinforce_plus_plus"])
def test_a_step_whose_rewards_are_all_equal_teaches_nothing(name: str, groups: list[list[float]]) -> None:
    assert estimate(groups, estimator(name)) == [[0.0] * len(group) for group in groups]
    if name == "reinforce_plus_plus":
        without = estimator(name, minus_baseline=False)
        assert estimate(groups, without) == [[0.0] * len(group) for group in groups]


def test_advantages_are_clipped_last() -> None:
    grpo = Grpo(use_leave_one_out_baseline=False, advantage_clip_low=-0.2, advantage_clip_high=2.0)
    (found,) = estimate([[1.0] + [0.0] * 15], grpo)
    assert found == [2.0] + [-0.2] * 15
    (found,) = estimate([[1.0] + [0.0] * 15], Grpo(use_leave_one_out_baseline=False, advantage_clip_low=-0.2))
    assert found[0] == pytest.approx(3.75, abs=1e-4)


@given(
    st.lists(st.lists(st.floats(-100, 100), max_size=6), max_size=4),
    st.sampled_from(["grpo", "maxrl", "reinforce_plus_plus"]),
    st.booleans(),
    st.booleans(),
)
def test_any_rewards_give_finite_advantages(
    groups: list[list[float]], name: str, normalize: bool, leave_one_out: bool
) -> None:
    grpo = Grpo(
        adv_estimator={"name": name},  # type: ignore[arg-type]
        normalize_rewards=normalize,
        use_leave_one_out_baseline=leave_one_out,
    )
    found = estimate(groups, grpo)
    assert [len(group) for group in found] == [len(group) for group in groups]
    assert all(math.isfinite(each) for group in found for each in group)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adv_estimator": {"name": "rloo"}}, "'grpo', 'reinforce_plus_plus' or 'maxrl'"),
        ({"adv_estimator": {"minus_baseline": False}}, "name to reinforce_plus_plus"),
        ({"num_generations_per_prompt": 1}, "needs 2 or more"),
        ({"advantage_clip_low": 0.5}, "advantage_clip_low: should be less than or equal to 0"),
        ({"advantage_clip_high": -0.5}, "advantage_clip_high: should be greater than or equal to 0"),
    ],
)
def test_advantages_that_cannot_be_had_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Grpo(**values)


def test_reinforce_plus_plus_without_baseline_allows_one_episode_per_task() -> None:
    single = {"name": "reinforce_plus_plus", "minus_baseline": False}
    assert Grpo(num_generations_per_prompt=1, adv_estimator=single).num_generations_per_prompt == 1  # type: ignore[arg-type]
