"""From judged groups to samples with advantages, and what to say about them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

import numpy

from slurmkit.grpo.advantage import group_advantages
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode
from slurmkit.rollout.sample import Sample


def credit(groups: Sequence[Group], *, normalize: bool, leave_one_out: bool) -> tuple[list[Sample], dict[str, float]]:
    """Samples of all groups, and metrics of the rollout with their names in metrics.jsonl.

    A group without signal (all its rewards equal, or fewer than two episodes left) gives samples whose advantage is
    0; `train:dropped_groups/REASON` counts it. An episode without a single sampled token (its prompt did not fit)
    gives no sample and takes no part in its group's statistics.
    """
    samples: list[Sample] = []
    dropped: Counter[str] = Counter()
    for group_id, group in enumerate(groups):
        episodes = [episode for episode in group.episodes if episode.completion.token_ids]
        rewards = [episode.score.reward for episode in episodes]
        advantages = group_advantages(rewards, normalize=normalize, leave_one_out=leave_one_out)
        if not any(advantages):
            dropped[_reason(episodes)] += 1
        for episode, advantage in zip(episodes, advantages, strict=True):
            samples.append(_sample(episode, advantage, group_id, rollout_id=len(samples)))
    return samples, _metrics(groups, dropped)


def _reason(episodes: Sequence[Episode]) -> str:
    if len(episodes) < 2:
        return "too_few_episodes"
    return "all_correct" if all(episode.score.correct for episode in episodes) else "none_correct"


def _sample(episode: Episode, advantage: float, group_id: int, rollout_id: int) -> Sample:
    given = len(episode.prompt_ids)
    token_ids = numpy.array(episode.prompt_ids + episode.completion.token_ids, numpy.int32)
    is_sampled = numpy.arange(len(token_ids)) >= given
    logprobs = numpy.zeros(len(token_ids), numpy.float32)
    logprobs[given:] = episode.completion.logprobs
    return Sample(
        token_ids=token_ids,
        loss_mask=is_sampled,
        logprobs=logprobs,
        advantage=numpy.where(is_sampled, numpy.float32(advantage), numpy.float32(0)),
        group_id=group_id,
        rollout_id=rollout_id,
        temperature=episode.temperature,
        weight_version=episode.completion.weight_version,
        finish_reason=episode.completion.finish_reason,
    )


def _metrics(groups: Sequence[Group], dropped: Counter[str]) -> dict[str, float]:
    episodes = [episode for group in groups for episode in group.episodes]
    reasons = Counter(episode.completion.finish_reason for episode in episodes)
    metrics = {
        "train:groups_with_signal": float(len(groups) - dropped.total()),
        **{f"train:dropped_groups/{reason}": float(count) for reason, count in sorted(dropped.items())},
        "train:broken_episodes": float(sum(len(group.broken) for group in groups)),
        "train:prompts_too_long": float(reasons["prompt_too_long"]),
    }
    if episodes:
        metrics |= {
            "train:reward_mean": statistics.fmean(episode.score.reward for episode in episodes),
            "train:accuracy": statistics.fmean(episode.score.correct for episode in episodes),
            "train:completion_tokens_mean": statistics.fmean(len(e.completion.token_ids) for e in episodes),
            "train:truncated_fraction": reasons["length"] / len(episodes),
        }
    return metrics
