"""Groups of episodes made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from slurmkit.envs.environment import Message, Score, Task
from slurmkit.generation.engine import Completion, FinishReason
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode, EpisodeEnd, Turn


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
    reward: float, *, name: str = "task", length: int = 2, reason: EpisodeEnd = "stop", correct: bool | None = None
) -> Episode:
    """An episode of one reply that is correct where its reward is above 0, of a prompt of three tokens."""
    replies = [] if reason == "prompt_too_long" else [completion((7,) * length, (-0.5,) * length)]
    return conversation(reward, *replies, name=name, reason=reason, correct=correct)


def conversation(
    reward: float,
    *replies: Completion,
    name: str = "task",
    reason: EpisodeEnd = "stop",
    correct: bool | None = None,
    added: Sequence[int] = (8, 9),
    prompt: Sequence[int] = (1, 2, 3),
    new: Sequence[int] = (),
) -> Episode:
    """An episode of several replies, `added` before each but the first; those with the numbers `new` begin a sample."""
    begins = [index in (0, *new) for index in range(len(replies))]
    given = [tuple(prompt) if begun else tuple(added) for begun in begins]
    return Episode(
        task=Task(name, f"{name}?", "1"),
        prompt_ids=tuple(prompt),
        turns=tuple(map(Turn, given, replies, begins)),
        temperature=1.0,
        score=Score(reward, reward > 0 if correct is None else correct),
        finish_reason=reason,
        messages=(Message("user", f"{name}?"), Message("assistant", "1")),
    )


def group(*rewards: float, name: str = "task", broken: Sequence[str] = ()) -> Group:
    return of(*(episode(reward, name=name) for reward in rewards), broken=broken)


def of(*episodes: Episode, broken: Sequence[str] = ()) -> Group:
    task = episodes[0].task if episodes else Task("task", "task?", "1")
    return Group(task, episodes, tuple(broken))
