"""Rollouts that begin before the step that trains on them: asynchronous GRPO, of which the synchronous is age 0.

An age counts training steps: how many the policy had made, since the weights that sampled a token, when the token's
own step began. On-policy tokens have age 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy

from slurmkit.config.algorithm import Grpo
from slurmkit.envs.environment import Task
from slurmkit.envs.tasks import TaskOrder
from slurmkit.grpo.selection import Selection, select
from slurmkit.rollout.collect import Group

# (step, tasks, tasks that the step has had before)
Play = Callable[[int, Sequence[Task], int], Awaitable[list[Group]]]


@dataclass(frozen=True, slots=True)
class Rollout:
    """The groups of one step. `position` counts the tasks that were drawn for all steps up to this one."""

    selection: Selection
    position: int


class Rollouts:
    """The rollouts of all steps, in order. Used as `async with Rollouts(...) as rollouts`; what is left is cancelled.

    A step's tasks are drawn once those of the steps before it are, so the order's place after a step does not depend on
    what has begun early, and a run that goes on from a checkpoint draws again what nobody had trained on.
    """

    def __init__(self, play: Play, order: TaskOrder, grpo: Grpo, *, last_step: int, num_tasks: int) -> None:
        """`num_tasks` are all that may be drawn, over all epochs."""
        self._play = play
        self._order = order
        self._grpo = grpo
        self._last_step = last_step
        self._num_tasks = num_tasks
        self._begun: dict[int, asyncio.Task[Rollout | None]] = {}
        self._drawn = asyncio.Event()
        self._drawn.set()
        self._step_of_version: dict[int, int] = {}
        self.position = order.position
        """Tasks drawn for the steps that were asked for."""

    @property
    def are_used_up(self) -> bool:
        """Whether there are not enough tasks for a step after those that were asked for."""
        return self._num_tasks - self.position < self._grpo.tasks_per_batch

    async def __aenter__(self) -> Rollouts:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._begun.values():
            task.cancel()
        await asyncio.gather(*self._begun.values(), return_exceptions=True)

    async def of(self, step: int, version: int) -> Selection:
        """The groups of a step, whose turn it is; the engines have the weights `version`, all updates before it.

        Those of the next grpo.max_age steps may begin meanwhile: that none begins earlier is what bounds their age.
        """
        self._step_of_version[version] = step - 1
        for number in range(step, min(step + self._grpo.max_age, self._last_step) + 1):
            if number not in self._begun:
                before, self._drawn = self._drawn, asyncio.Event()
                self._begun[number] = asyncio.create_task(self._roll(number, before, self._drawn))
        # Not cancelled with whoever waits for it: `__aexit__` does that.
        rollout = await asyncio.shield(self._begun[step])
        if rollout is None:
            raise ValueError(f"step {step} has no tasks left")
        del self._begun[step]
        self.position = rollout.position
        return rollout.selection

    def ages(self, groups: Iterable[Group], step: int) -> dict[str, float]:
        """Of the sampled tokens of a step's groups, with their names in metrics.jsonl."""
        sampled = [
            turn.completion.weight_versions for group in groups for episode in group.episodes for turn in episode.turns
        ]
        versions, counts = numpy.unique(numpy.concatenate([numpy.zeros(0, numpy.int32), *sampled]), return_counts=True)
        if not len(versions):
            return {}
        ages = [step - 1 - self._step_of_version[version] for version in versions.tolist()]
        return {
            "train:age_mean": float(numpy.average(ages, weights=counts)),
            "train:age_max": float(max(ages)),
        }

    async def _roll(self, step: int, before: asyncio.Event, drawn: asyncio.Event) -> Rollout | None:
        """One step's groups, its tasks drawn after those of the step `before`; None where there are not enough."""
        await before.wait()
        grpo, position = self._grpo, self._order.position
        if self._num_tasks - position < grpo.tasks_per_batch:
            return None

        async def play(count: int, played: int) -> list[Group]:
            nonlocal position
            tasks, position = self._order.draw(count), self._order.position
            if not grpo.use_dynamic_sampling:  # which may have to draw again
                drawn.set()
            return await self._play(step, tasks, played)

        selection = await select(play, grpo)
        drawn.set()
        return Rollout(selection, position)
