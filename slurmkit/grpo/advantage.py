"""Group advantages: how much better an episode did than the others of its task.

GRPO: Shao et al. 2024 (arXiv 2402.03300), equation 3's A_i; without the division Liu et al. 2025, Dr. GRPO (arXiv
2503.20783); leave-one-out: Ahmadian et al. 2024, RLOO (arXiv 2402.14740).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# NeMo RL's: keeps nearly equal rewards from being blown up by the division.
EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], *, normalize: bool, leave_one_out: bool) -> list[float]:
    """One advantage per reward of one group.

    The baseline is the group's mean, or with `leave_one_out` the mean of the *other* episodes. `normalize` divides by
    the unbiased standard deviation of the same episodes; where those do not spread (or are one alone), the advantage
    is left as it is, as NeMo RL does. A group of one, or one whose rewards are all equal, gives zeros.
    """
    if len(rewards) < 2 or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    advantages = []
    for index, reward in enumerate(rewards):
        compared = [*rewards[:index], *rewards[index + 1 :]] if leave_one_out else rewards
        advantage = reward - statistics.fmean(compared)
        spread = statistics.stdev(compared) if len(compared) > 1 else 0.0
        advantages.append(advantage / (spread + EPSILON) if normalize and spread > 0 else advantage)
    return advantages
