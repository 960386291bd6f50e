"""Groups of episodes made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from slurmkit.envs.environment import Message, Score, Task
from slurmkit.generation.engine import Completion, FinishReason
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode


def completion(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    reason: FinishReason = "stop",
    *,
    text: str = "1",
    versions: int | Sequence[int] = 0,
) -> Completion:
    arrays = numpy.array(token_ids, numpy.int32), numpy.array(logprobs, numpy.float32)
    return Completion(*arrays, text, reason, numpy.full(len(token_ids), versions, numpy.int32))


def episode(
    reward: float, *, name: str = "task", length: int = 2, reason: FinishReason = "stop", correct: bool | None = None
) -> Episode:
    """An episode that is correct where its reward is above 0, of a prompt of three tokens."""
    length = 0 if reason == "prompt_too_long" else length
    return Episode(
        task=Task(name, f"{name}?", "1"),
        prompt_ids=(1, 2, 3),
        completion=completion((7,) * length, (-0.5,) * length, reason),
        temperature=1.0,
        score=Score(reward, reward > 0 if correct is None else correct),
        messages=(Message("user", f"{name}?"), Message("assistant", "1")),
    )


def group(*rewards: float, name: str = "task", broken: Sequence[str] = ()) -> Group:
    return of(*(episode(reward, name=name) for reward in rewards), broken=broken)


def of(*episodes: Episode, broken: Sequence[str] = ()) -> Group:
    task = episodes[0].task if episodes else Task("task", "task?", "1")
    return Group(task, episodes, tuple(broken))
