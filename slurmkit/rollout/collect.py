"""Many episodes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from slurmkit.envs.environment import Domain, Task
from slurmkit.generation.actors import together
from slurmkit.generation.engine import SamplingParams
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.episode import BrokenEnvironment, Episode, Generate, run_episode


@dataclass(frozen=True, slots=True)
class Group:
    """The episodes of one task. `broken` says what the environments of the missing ones raised."""

    task: Task
    episodes: tuple[Episode, ...]
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a round of episodes is sampled; every completion's own seed follows from `seed` and its place."""

    temperature: float
    max_new_tokens: int
    seed: tuple[int, ...]

    def of_episode(self, index: int) -> SamplingParams:
        seed = int(numpy.random.SeedSequence([*self.seed, index]).generate_state(1, numpy.uint64)[0])
        return SamplingParams(self.temperature, self.max_new_tokens, seed)


async def collect(
    tasks: Sequence[Task],
    *,
    episodes_per_task: int,
    domain: Domain,
    policy: Generate,
    chat: Chat,
    sampling: Sampling,
    environment_timeout_seconds: float,
) -> list[Group]:
    """Play `episodes_per_task` episodes of every task, all concurrently.

    An episode whose environment raises is missing from its group and named there. A failing engine ends everything.
    """

    async def play(task: Task, index: int) -> Episode | str:
        try:
            return await run_episode(
                task,
                domain.environment(),
                policy,
                chat,
                sampling.of_episode(index),
                timeout_seconds=environment_timeout_seconds,
            )
        except BrokenEnvironment as error:
            return str(error)

    rollouts = [task for task in tasks for _ in range(episodes_per_task)]
    played = await together(*(play(task, index) for index, task in enumerate(rollouts)))
    groups = []
    for first, task in zip(range(0, len(played), episodes_per_task), tasks, strict=True):
        outcomes = played[first : first + episodes_per_task]
        groups.append(
            Group(
                task,
                episodes=tuple(outcome for outcome in outcomes if isinstance(outcome, Episode)),
                broken=tuple(outcome for outcome in outcomes if isinstance(outcome, str)),
            )
        )
    return groups
