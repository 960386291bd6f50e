"""What is said about a validation: its figures, conversations for people to read, and whether it is good enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slurmkit.config.algorithm import Grpo
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.environment import Domain, Message
from slurmkit.errors import Failure
from slurmkit.grpo.progress import Count, reported
from slurmkit.grpo.sample_files import write_lines
from slurmkit.grpo.selection import score_metrics
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Group, Sampling, collect
from slurmkit.rollout.episode import Generate, Limits

# Apart in the seed, so that validation draws the same random numbers every time it is run.
TRAINING, VALIDATION = 0, 1


def pass_at_k(num_episodes: int, num_correct: int, k: int) -> float:
    """The probability that one of k episodes of a task is correct, where `num_correct` of `num_episodes` >= k were.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    return 1 - math.comb(num_episodes - num_correct, k) / math.comb(num_episodes, k)


def validation_metrics(groups: Sequence[Group], grpo: Grpo) -> dict[str, float]:
    """Figures over all episodes, and pass@k over the tasks of which enough episodes were played.

    Failure where every environment broke.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    broken = [text for group in groups for text in group.broken]
    if not episodes:
        raise Failure(f"the environment broke in all {len(broken)} validation episodes; first in {broken[0]}")
    metrics = {
        **score_metrics("val", episodes),
        "val:broken_episodes": float(len(broken)),
    }
    for k in grpo.pass_at:
        counts = [(len(group.episodes), sum(each.score.correct for each in group.episodes)) for group in groups]
        played = [pass_at_k(n, correct, k) for n, correct in counts if n >= k]
        if played:
            metrics[f"val:pass@{k}"] = statistics.fmean(played)
    return metrics


def write_transcripts(run_directory: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write validation/step_N.jsonl, a line for each episode of `groups`; its path.

    Failure where that cannot be written.
    """
    path = run_directory / "validation" / f"step_{step}.jsonl"
    lines = [
        {
            "task": episode.task.name,
            "messages": [_said(message) for message in episode.messages],
            "reward": episode.score.reward,
            "correct": episode.score.correct,
            "finish_reason": episode.finish_reason,
        }
        for group in groups
        for episode in group.episodes
    ]
    write_lines(path, lines)
    return path


def _said(message: Message) -> dict[str, Any]:
    """A message, without what it has not."""
    calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    facts = {"tool_calls": calls, "tool_call_id": message.tool_call_id, "name": message.name}
    return {"role": message.role, "content": message.content, **{name: fact for name, fact in facts.items() if fact}}


async def play_validation(
    config: TrainConfig,
    domain: Domain,
    policy: Generate,
    chat: Chat,
    *,
    weight_version: int = 0,
    phase: str = "validation",
) -> list[Group]:
    """Episodes of the validation tasks, sampled as in training, with the same random numbers each time.

    `weight_version`: how many updates the policy's weights have seen. `phase`: the name in the log.
    """
    tasks, episodes = domain.validation_tasks[: config.grpo.max_val_samples], config.grpo.val_num_generations_per_prompt
    count = Count(total=len(tasks) * episodes)
    playing = collect(
        tasks,
        episodes_per_task=episodes,
        domain=domain,
        policy=policy,
        chat=chat,
        sampling=Sampling.of(config, (VALIDATION,)),
        limits=Limits.of(config),
        weight_version=weight_version,
        finished=count.add,
    )
    return await reported(phase, playing, count)


def is_good_enough(metrics: Mapping[str, float], grpo: Grpo) -> bool:
    """Whether the run stops here: the validation among `metrics`, if there was one, has reached its threshold."""
    metric, threshold = grpo.stop_at_validation_metric, grpo.stop_at_validation_threshold
    return metric is not None and threshold is not None and metrics.get(metric, -math.inf) >= threshold
