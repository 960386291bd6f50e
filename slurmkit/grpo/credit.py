"""From judged groups to samples with advantages, and what to say about them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import nan

import numpy
import torch
from numpy.typing import NDArray

from slurmkit.config.algorithm import Grpo, LossFn
from slurmkit.grpo.advantage import advantages
from slurmkit.grpo.kl import reference_kl
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode
from slurmkit.rollout.sample import Sample


def make_samples(groups: Sequence[Group]) -> list[Sample]:
    """The samples of all groups, with advantages of 0 until they are credited.

    An episode without a single sampled token (its prompt did not fit) gives none, and one whose conversation was begun
    anew several: what it was begun with is given, and trained where it was sampled. A token whose logprob the engine
    could not tell (NaN, infinite) is not trained on, and so is in no denominator.
    """
    places = [
        (group_id, rollout_id, episode, turns)
        for group_id, group in enumerate(_played(groups))
        for rollout_id, episode in group
        for turns in episode.samples
    ]
    if not places:
        return []
    # All of them end to end, and cut at the end: a few calls of numpy for the step, in place of a few for each.
    pieces, known, lengths = list[NDArray[numpy.int32]](), list[NDArray[numpy.float32]](), list[int]()
    # The episodes of a group share their prompt, by identity: comparing long prompts would take longer than all else.
    added = {id(turn.added_ids): turn.added_ids for *_, turns in places for turn in turns}
    given = {number: numpy.array(ids, numpy.int32) for number, ids in added.items()}
    nothing = numpy.full(max(map(len, given.values())), nan, numpy.float32)
    for *_, turns in places:
        for turn in turns:
            pieces += given[id(turn.added_ids)], turn.completion.token_ids
            known += nothing[: len(turn.added_ids)], turn.completion.logprobs
        lengths.append(sum(len(turn.added_ids) + len(turn.completion.token_ids) for turn in turns))
    ends = list(itertools.accumulate(lengths))
    token_ids, logprobs = numpy.concatenate(pieces, dtype=numpy.int32), numpy.concatenate(known, dtype=numpy.float32)
    loss_mask, advantage = numpy.isfinite(logprobs), numpy.zeros(len(token_ids), numpy.float32)
    logprobs[~loss_mask] = 0
    return [
        Sample(
            token_ids=token_ids[start:end],
            loss_mask=loss_mask[start:end],
            logprobs=logprobs[start:end],
            advantage=advantage[start:end],
            group_id=group_id,
            rollout_id=rollout_id,
            temperature=episode.temperature,
            weight_version=int(turns[0].completion.weight_versions[0]),
            finish_reason=episode.finish_reason,
        )
        for (group_id, rollout_id, episode, turns), start, end in zip(places, [0, *ends], ends, strict=False)
    ]


def credit(
    groups: Sequence[Group], samples: Sequence[Sample], grpo: Grpo, loss_fn: LossFn
) -> tuple[list[Sample], dict[str, float]]:
    """The samples of `groups` with their episodes' advantages, and metrics with their names in metrics.jsonl.

    Broken episodes, and those without a sampled token, take no part in their group's statistics. A group without
    signal (none of its episodes has an advantage) is counted in `train:dropped_groups/REASON`.

    With loss_fn.use_kl_in_reward every sample carries `reference_logprobs`, and an episode's reward is lowered by its
    penalty × the KL summed over its trained tokens: the gradient is then that of the whole episode's KL, what a token
    does to later ones included. The policy's logprobs in it are `prev_logprobs` where there are any, else the engine's.
    """
    tokens, kl = Counter[int](), dict[int, float]()
    for sample in samples:
        tokens[sample.rollout_id] += sample.num_trained_tokens
        if loss_fn.use_kl_in_reward:
            kl[sample.rollout_id] = kl.get(sample.rollout_id, 0.0) + _kl(sample, loss_fn)
    played = _played(groups)
    penalty = loss_fn.reference_policy_kl_penalty
    rewards = [[episode.score.reward - penalty * kl.get(number, 0.0) for number, episode in group] for group in played]
    found = advantages(rewards, [[tokens[number] for number, _ in group] for group in played], grpo)
    dropped = Counter(reason_without_signal(group) for group, each in zip(groups, found, strict=True) if not any(each))
    numbers = [number for group in played for number, _ in group]
    advantage_of = dict(zip(numbers, itertools.chain(*found), strict=True))
    credited = [
        replace(sample, advantage=sample.loss_mask * numpy.float32(advantage_of[sample.rollout_id]))
        for sample in samples
    ]
    metrics = {
        "train:groups_with_signal": float(len(groups) - dropped.total()),
        **{f"train:dropped_groups/{reason}": float(count) for reason, count in sorted(dropped.items())},
    }
    sampled = sum(episode.num_sampled_tokens for group in played for _, episode in group)
    metrics["train:tokens_without_logprob"] = float(sampled - tokens.total())
    if loss_fn.use_kl_in_reward:
        metrics["train:kl_penalty"] = sum(kl.values()) / max(1, tokens.total())
    return credited, metrics


def _played(groups: Sequence[Group]) -> list[list[tuple[int, Episode]]]:
    """Of each group, the episodes with a sampled token, each with its `rollout_id`."""
    numbers = itertools.count()
    return [[(next(numbers), episode) for episode in group.episodes if episode.num_sampled_tokens] for group in groups]


def reason_without_signal(group: Group) -> str:
    """Why a group teaches nothing, as metrics.jsonl has it."""
    episodes = [episode for episode in group.episodes if episode.num_sampled_tokens]
    if len(episodes) < 2:
        is_known = (
            not episodes and not group.broken and all(e.finish_reason == "prompt_too_long" for e in group.episodes)
        )
        return "prompt_too_long" if is_known else "too_few_episodes"
    if all(episode.score.correct for episode in episodes):
        return "all_correct"
    return "equal_rewards" if any(episode.score.correct for episode in episodes) else "none_correct"


def _kl(sample: Sample, loss_fn: LossFn) -> float:
    """Of all trained tokens together."""
    if sample.reference_logprobs is None:
        raise ValueError("use_kl_in_reward needs the samples' reference_logprobs, and they have none")
    own = sample.logprobs if sample.prev_logprobs is None else sample.prev_logprobs
    kl_T = reference_kl(torch.from_numpy(own), torch.from_numpy(sample.reference_logprobs), loss_fn)
    return float(kl_T.numpy()[sample.loss_mask].sum(dtype=numpy.float64))


def by_rollout(groups: Sequence[Group]) -> dict[int, Episode]:
    """The episodes that samples were made of, by the `rollout_id` of those."""
    return dict(itertools.chain(*_played(groups)))
