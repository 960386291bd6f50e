"""Advantages: how much better an episode did than the others of its task, or of its step.

GRPO: Shao et al. 2024 (arXiv 2402.03300), equation 3's A_i; without the division Liu et al. 2025, Dr. GRPO (arXiv
2503.20783); leave-one-out: Ahmadian et al. 2024, RLOO (arXiv 2402.14740); REINFORCE++: Hu et al. 2025 (arXiv
2501.03262); MaxRL: Tajwar et al. 2026 (arXiv 2602.02710).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import fsum, inf, sqrt

from slurmkit.config.algorithm import Grpo

# NeMo RL's: they keep nearly equal rewards from being blown up by the division.
EPSILON = 1e-6
MIN_VARIANCE = 1e-8


def advantages(
    rewards: Sequence[Sequence[float]], num_tokens: Sequence[Sequence[int]], grpo: Grpo
) -> list[list[float]]:
    """One advantage per reward of each group of a step, estimated and clipped as `grpo` says.

    `num_tokens` are the episodes' trained tokens, which reinforce_plus_plus's mean and spread are taken over.
    """
    match grpo.adv_estimator.name:
        case "grpo":
            normalize, leave_one_out = grpo.normalizes, grpo.leaves_one_out
            groups = [group_advantages(group, normalize=normalize, leave_one_out=leave_one_out) for group in rewards]
        case "maxrl":
            groups = [maxrl_advantages(group) for group in rewards]
        case "reinforce_plus_plus":
            groups = reinforce_plus_plus(rewards, num_tokens, minus_baseline=grpo.adv_estimator.minus_baseline)
    low = -inf if grpo.advantage_clip_low is None else grpo.advantage_clip_low
    high = inf if grpo.advantage_clip_high is None else grpo.advantage_clip_high
    return [[min(max(advantage, low), high) for advantage in group] for group in groups]


def group_advantages(rewards: Sequence[float], *, normalize: bool, leave_one_out: bool) -> list[float]:
    """One advantage per reward of one group.

    The baseline is the group's mean, or with `leave_one_out` the mean of the *other* episodes. `normalize` divides by
    the unbiased standard deviation of the same episodes; where those do not spread (or are one alone), the advantage
    is left as it is, as NeMo RL does. A group of one, or one whose rewards are all equal, gives zeros.
    """
    if not _spread(rewards):
        return [0.0] * len(rewards)
    advantage_of: dict[float, float] = {}
    for index, reward in enumerate(rewards):
        if reward not in advantage_of:  # equal ones are compared with the same others
            compared = [*rewards[:index], *rewards[index + 1 :]] if leave_one_out else rewards
            mean, scale = _mean_and_scale(compared, normalize)
            advantage_of[reward] = (reward - mean) / scale
    return [advantage_of[reward] for reward in rewards]


def _mean_and_scale(rewards: Sequence[float], normalize: bool) -> tuple[float, float]:
    """What is taken off a reward, and what the rest is divided by."""
    mean = fsum(rewards) / len(rewards)
    if not normalize or not _spread(rewards):
        return mean, 1.0
    # statistics.stdev is exact, in fractions: twenty times as long.
    return mean, sqrt(fsum([(reward - mean) ** 2 for reward in rewards]) / (len(rewards) - 1)) + EPSILON


def maxrl_advantages(rewards: Sequence[float]) -> list[float]:
    """(reward − mean) / mean of one group (arXiv 2602.02710, algorithm 1): the lone success of a hard task counts most.

    For rewards of 0 and 1 and N episodes of success rate p, the expected gradient is ∇p (1 − (1 − p)^(N−1)) / p, the
    first terms of ∇log p. Zeros where the mean is not positive or the rewards do not spread.
    """
    mean = statistics.fmean(rewards) if rewards else 0.0
    return [(reward - mean) / mean if mean > 0 and _spread(rewards) else 0.0 for reward in rewards]


def reinforce_plus_plus(
    rewards: Sequence[Sequence[float]], num_tokens: Sequence[Sequence[int]], *, minus_baseline: bool
) -> list[list[float]]:
    """Rewards less their mean over the step, divided by their standard deviation over the step (arXiv 2501.03262).

    Mean and deviation are those of tokens, as in NeMo RL: an episode counts as often as it has trained tokens. With
    `minus_baseline` the group's mean is taken off first, and a group of one, or one whose rewards are all equal, has
    nothing to say: it gives zeros. So does a step whose rewards are all equal.
    """
    values = [[reward - statistics.fmean(group) if minus_baseline else reward for reward in group] for group in rewards]
    flat = [value for group in values for value in group]
    counts = [count for group in num_tokens for count in group]
    if not _spread(flat) or not sum(counts):
        return [[0.0] * len(group) for group in rewards]
    mean = fsum(value * count for value, count in zip(flat, counts, strict=True)) / sum(counts)
    variance = fsum((value - mean) ** 2 * count for value, count in zip(flat, counts, strict=True)) / sum(counts)
    scale = 1 / sqrt(max(variance, MIN_VARIANCE))
    return [
        [(value - mean) * scale if _spread(group) or not minus_baseline else 0.0 for value in centred]
        for group, centred in zip(rewards, values, strict=True)
    ]


def _spread(rewards: Sequence[float]) -> bool:
    return len(rewards) > 1 and min(rewards) != max(rewards)
