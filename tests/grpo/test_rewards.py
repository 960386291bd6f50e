"""From the environment's reward to the one that is trained on."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from slurmkit.config.algorithm import MAX_REWARD, Grpo, RewardScaling, RewardShaping
from slurmkit.grpo.advantage import advantages
from slurmkit.grpo.rewards import scaled, shaped, shaped_group
from tests.support.groups import episode, of

SOFT = RewardShaping(enabled=True, overlong_buffer_length=4, overlong_buffer_penalty=0.5, max_response_length=10)


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (6, 0), (7, 1 / 4), (8, 2 / 4), (9, 3 / 4), (10, 1), (11, 1), (1000, 1)]
)
def test_the_soft_penalty_grows_over_the_buffer_and_no_further(length: int, penalty: float) -> None:
    """arXiv 2503.14476, equation 13, with L_max 10 and L_cache 4."""
    assert shaped(episode(1.0, length=length), SOFT) == pytest.approx(1 - 0.5 * penalty)


def test_a_truncated_reply_earns_a_part_of_its_reward() -> None:
    shaping = RewardShaping(enabled=True, stop_properly_penalty_coef=0.25)
    assert shaped(episode(1.0, reason="length"), shaping) == 0.25
    assert shaped(episode(1.0, reason="stop"), shaping) == 1.0


@pytest.mark.parametrize(("reward", "expected"), [(0.0, -1.0), (2.0, 3.0), (0.5, 0.0), (-9.0, -1.0), (9.0, 3.0)])
def test_scaling_is_linear_between_its_ends_and_clamps_outside(reward: float, expected: float) -> None:
    scaling = RewardScaling(enabled=True, source_min=0.0, source_max=2.0, target_min=-1.0, target_max=3.0)
    assert scaled(reward, scaling) == expected


def test_what_is_not_enabled_changes_nothing() -> None:
    grpo = Grpo(reward_scaling=RewardScaling(target_max=9.0), reward_shaping=RewardShaping(overlong_buffer_length=1))
    given = of(episode(0.7, length=50), episode(-3.0, reason="length"))
    assert shaped_group(given, grpo) == given


def test_shaping_follows_scaling_and_leaves_what_is_correct() -> None:
    grpo = Grpo(reward_scaling=RewardScaling(enabled=True, target_max=10.0), reward_shaping=SOFT)
    found = shaped_group(of(episode(1.0, length=10), episode(0.0)), grpo)
    assert [each.score.reward for each in found.episodes] == [9.5, 0.0]
    assert [each.score.correct for each in found.episodes] == [True, False]


@pytest.mark.parametrize(
    "keys",
    [
        {"reward_scaling": {"target_max": 1e200}},
        {"reward_scaling": {"target_min": -1e200}},
        {"reward_scaling": {"source_max": 1e200}},
        {"reward_shaping": {"overlong_buffer_penalty": 1e200}},
    ],
)
def test_what_scales_or_shapes_a_reward_is_bounded(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"1000000000|1e\+09"):
        Grpo.model_validate(keys)


@pytest.mark.parametrize("name", ["grpo", "maxrl", "reinforce_plus_plus"])
@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_of_the_largest_rewards_stay_within_float32(name: str, normalize: bool) -> None:
    grpo = Grpo.model_validate({"adv_estimator": {"name": name}, "normalize_rewards": normalize})
    low = 0 if name == "maxrl" else -MAX_REWARD
    (found,) = advantages([[MAX_REWARD, low]], [[7, 7]], grpo)
    squares = numpy.full(1_000_000, max(map(abs, found)), numpy.float32) ** 2
    assert found[0] > 0
    assert numpy.isfinite(squares.sum(dtype=numpy.float32))
