"""Which groups of a step are trained on, and what is said about all that were generated.

Dynamic sampling: Yu et al. 2025, DAPO (arXiv 2503.14476), section 3.2, equation 11.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy

from slurmkit.config.algorithm import Grpo
from slurmkit.errors import Failure
from slurmkit.grpo.credit import reason_without_signal
from slurmkit.grpo.rewards import scaled_group
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode, EpisodeEnd
from slurmkit.rollout.sample import Sample

_NAMED = 3


class NothingToLearn(Failure):
    """The tasks, or their environment, teach nothing more. The policy is as its last finished step left it."""


@dataclass(frozen=True, slots=True)
class Selection:
    """All groups that a step generated, in order, and those of them that it trains on.

    `dropped` counts by reason the groups that dynamic sampling left out, `num_discarded` those that it would have kept
    but had enough of.
    """

    generated: Sequence[Group]
    kept: Sequence[Group]
    dropped: Counter[str]
    num_batches: int
    num_discarded: int

    def metrics(self, of_kept: dict[str, float]) -> dict[str, float]:
        """Figures of the rollout with their names in metrics.jsonl, `of_kept` being those of the groups kept.

        `reward_mean`, `accuracy` and the lengths are over everything that was generated. `filtered_reward_mean` is over
        the groups whose rewards differ, and says little about the policy: they are chosen for being partly right.
        """
        episodes = _episodes(self.generated)
        differing = _episodes([group for group in self.kept if _differs(group)])
        metrics = of_kept | {
            "train:gen_batches": float(self.num_batches),
            "train:discarded_groups": float(self.num_discarded),
            "train:broken_episodes": float(sum(len(group.broken) for group in self.generated)),
        }
        for reason, count in sorted(self.dropped.items()):
            name = f"train:dropped_groups/{reason}"
            metrics[name] = metrics.get(name, 0.0) + count
        if differing:
            metrics["train:filtered_reward_mean"] = statistics.fmean(episode.score.reward for episode in differing)
        if episodes:
            metrics |= score_metrics("train", episodes)
        return metrics

    def remarks(self) -> Iterator[str]:
        """One line for each thing that somebody who watches the run should see."""
        broken = [text for group in self.generated for text in group.broken]
        if broken:
            yield f"the environment broke in {len(broken)} of {_count(self.generated)} episodes, first in {broken[0]}"
        too_long = {e.task.name: len(e.prompt_ids) for e in _episodes(self.generated) if _is_too_long(e)}
        if too_long:
            named = [f"{name} ({count} tokens)" for name, count in too_long.items()]
            shown = ", ".join(named[:_NAMED] + ["…"] * (len(named) > _NAMED))
            yield f"{len(named)} tasks whose prompt does not fit are not trained on: {shown}"


async def select(play: Callable[[int, int], Awaitable[list[Group]]], grpo: Grpo) -> Selection:
    """The groups of one step: as many as it asks for; with dynamic sampling as many whose rewards differ.

    `play(count, before)` plays `count` further tasks, `before` tasks of the step having been played. Whole groups are
    kept or dropped, on the reward before it is shaped. What is too much is discarded, so that a run's place in its data
    remains one number. NothingToLearn where the environment broke too often, or where as many batches as
    dynamic_sampling_max_gen_batches were not enough.
    """
    wanted, generated, kept = grpo.num_prompts_per_step, list[Group](), list[Group]()
    dropped = Counter[str]()
    most = grpo.dynamic_sampling_max_gen_batches if grpo.use_dynamic_sampling else 1
    for number in range(1, most + 1):
        groups = await play(grpo.tasks_per_batch, len(generated))
        generated += groups
        _check_broken(generated, grpo.max_broken_fraction)
        if not grpo.use_dynamic_sampling:
            return Selection(generated, generated, dropped, number, 0)
        differ = [_differs(scaled_group(group, grpo)) for group in groups]
        kept += [group for group, does in zip(groups, differ, strict=True) if does]
        dropped.update(reason_without_signal(group) for group, does in zip(groups, differ, strict=True) if not does)
        if len(kept) >= wanted:
            return Selection(generated, kept[:wanted], dropped, number, len(kept) - wanted)
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
    raise NothingToLearn(
        f"{len(kept)} of {len(generated)} groups carry signal after {most} batches "
        f"(grpo.dynamic_sampling_max_gen_batches), and a step needs {wanted} (grpo.num_prompts_per_step); dropped: "
        f"{reasons}. Try tasks of which the model can do some, more generations per prompt, more batches, or fewer "
        "prompts per step"
    )


def without_truncated(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, the truncated ones without a token that the loss counts (overlong filtering, DAPO section 3.4)."""
    return [
        replace(sample, loss_mask=numpy.zeros_like(sample.loss_mask), advantage=numpy.zeros_like(sample.advantage))
        if sample.finish_reason == "length"
        else sample
        for sample in samples
    ]


def score_metrics(prefix: str, episodes: Sequence[Episode]) -> dict[str, float]:
    """Rewards, lengths and ends of one episode or more, and what their environments counted, by name."""
    counted = dict.fromkeys(name for each in episodes for name in each.score.counts)
    return {
        **{f"{prefix}:{name}": sum(each.score.counts.get(name, 0.0) for each in episodes) for name in counted},
        f"{prefix}:reward_mean": statistics.fmean(each.score.reward for each in episodes),
        f"{prefix}:reward_std": float(numpy.std([each.score.reward for each in episodes])),
        f"{prefix}:accuracy": statistics.fmean(each.score.correct for each in episodes),
        f"{prefix}:completion_tokens_mean": statistics.fmean(each.num_sampled_tokens for each in episodes),
        f"{prefix}:turns_mean": statistics.fmean(len(each.turns) for each in episodes),
        f"{prefix}:tool_calls_mean": statistics.fmean(each.num_tool_calls for each in episodes),
        f"{prefix}:malformed_tool_calls": float(sum(each.num_malformed_calls for each in episodes)),
        f"{prefix}:truncated_fraction": statistics.fmean(each.finish_reason == "length" for each in episodes),
        f"{prefix}:prompts_too_long": _ended(episodes, "prompt_too_long"),
        f"{prefix}:max_turns_reached": _ended(episodes, "max_turns"),
        f"{prefix}:timed_out": _ended(episodes, "timeout"),
    }


def _ended(episodes: Sequence[Episode], reason: EpisodeEnd) -> float:
    return float(sum(each.finish_reason == reason for each in episodes))


def _differs(group: Group) -> bool:
    rewards = {episode.score.reward for episode in group.episodes if episode.num_sampled_tokens}
    return len(rewards) > 1


def _is_too_long(episode: Episode) -> bool:
    return episode.finish_reason == "prompt_too_long"


def _check_broken(groups: Sequence[Group], most: float) -> None:
    broken, count = [text for group in groups for text in group.broken], _count(groups)
    if len(broken) > most * count:
        raise NothingToLearn(
            f"the environment broke in {len(broken)} of {count} episodes, which is more than grpo.max_broken_fraction "
            f"{most:g}; first in {broken[0]}"
        )


def _episodes(groups: Sequence[Group]) -> list[Episode]:
    return [episode for group in groups for episode in group.episodes]


def _count(groups: Sequence[Group]) -> int:
    return sum(len(group.episodes) + len(group.broken) for group in groups)
