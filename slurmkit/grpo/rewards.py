"""From the environment's reward to the one that is trained on: scaled, then shaped by the reply's length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slurmkit.config.algorithm import Grpo, RewardScaling, RewardShaping
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode


def scaled_group(group: Group, grpo: Grpo) -> Group:
    """The group with its rewards scaled: what dynamic sampling looks at."""
    if not grpo.reward_scaling.enabled:
        return group
    return _with_rewards(group, lambda episode: scaled(episode.score.reward, grpo.reward_scaling))


def shaped_group(group: Group, grpo: Grpo) -> Group:
    """The group with the rewards that are trained on: scaled, then shaped."""
    group = scaled_group(group, grpo)
    if not grpo.reward_shaping.enabled:
        return group
    return _with_rewards(group, lambda episode: shaped(episode, grpo.reward_shaping))


def scaled(reward: float, scaling: RewardScaling) -> float:
    """Linear from the source's range to the target's; a reward outside the source's range counts as its nearest end."""
    if not scaling.enabled:
        return reward
    clamped = min(max(reward, scaling.source_min), scaling.source_max)
    part = (clamped - scaling.source_min) / (scaling.source_max - scaling.source_min)
    return scaling.target_min + part * (scaling.target_max - scaling.target_min)


def shaped(episode: Episode, shaping: RewardShaping) -> float:
    """The episode's reward, less what the length of its replies together costs.

    DAPO's soft penalty (arXiv 2503.14476, equation 13) times overlong_buffer_penalty; with stop_properly_penalty_coef,
    that part of the reward of a truncated episode.
    """
    reward = episode.score.reward
    if not shaping.enabled:
        return reward
    if shaping.stop_properly_penalty_coef is not None:
        return reward * shaping.stop_properly_penalty_coef if episode.finish_reason == "length" else reward
    longest, buffer, penalty = (
        shaping.max_response_length,
        shaping.overlong_buffer_length,
        shaping.overlong_buffer_penalty,
    )
    assert longest is not None  # the schema has seen to it
    assert buffer is not None
    assert penalty is not None
    overlong = min(max(episode.num_sampled_tokens - (longest - buffer), 0), buffer)
    return reward - penalty * overlong / buffer


def _with_rewards(group: Group, reward_of: Callable[[Episode], float]) -> Group:
    episodes = (replace(each, score=replace(each.score, reward=reward_of(each))) for each in group.episodes)
    return replace(group, episodes=tuple(episodes))
