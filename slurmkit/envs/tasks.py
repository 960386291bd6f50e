"""An order of tasks that can be taken up again, and what is held out of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from random import Random

from slurmkit.config.data import Data, DataSource
from slurmkit.envs.environment import Task, TaskSource
from slurmkit.errors import UserError


class TaskOrder:
    """An endless, reproducible order of tasks whose whole state is one number.

    The next task is of the source that is furthest behind its share, so that any stretch of the order holds the
    sources as they are weighted, to within a task or so. Each source's own order is, in each of its epochs, a
    permutation that follows from (seed, source, epoch). So the place reached says everything: an interrupted run draws
    the same tasks as one that was not. Sources weighted by their numbers of tasks are all used up together.
    """

    def __init__(self, sources: Sequence[TaskSource], *, seed: int, shuffle: bool, position: int = 0) -> None:
        """`position`: how many tasks were drawn before, over all epochs."""
        self._sources = sources
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self.position = position

    @property
    def position(self) -> int:
        """How many tasks were drawn, over all sources and epochs."""
        return sum(self._drawn)

    @position.setter
    def position(self, position: int) -> None:
        self._drawn = [position] if len(self._sources) == 1 else [0] * len(self._sources)
        while self.position < position:
            self._drawn[self._furthest_behind()] += 1

    @property
    def digest(self) -> str:
        """SHA-256 of all tasks: a position is worth nothing in another data set."""
        digest = hashlib.sha256()
        for index, source in enumerate(self._sources):
            digest.update(b"\n" if index else b"")
            for task in source.tasks:
                context = [[message.role, message.content] for message in task.context]
                parts = [task.name, task.question, task.answer, *context]
                digest.update(json.dumps(parts).encode())
        return digest.hexdigest()

    def draw(self, count: int) -> list[Task]:
        """The next `count` tasks, across the end of an epoch where it comes to that."""
        return [self._next() for _ in range(count)]

    def _furthest_behind(self) -> int:
        total, number = sum(source.weight for source in self._sources), self.position + 1
        behind = [source.weight * number - total * n for source, n in zip(self._sources, self._drawn, strict=True)]
        return behind.index(max(behind))

    def _next(self) -> Task:
        index = self._furthest_behind()
        tasks = self._sources[index].tasks
        epoch, place = divmod(self._drawn[index], len(tasks))
        known, order = self._orders.get(index, (-1, []))
        if epoch != known:
            order = list(range(len(tasks)))
            if self._shuffle:
                which = f" source {index}" if index else ""
                Random(f"{self._seed} epoch {epoch}{which}").shuffle(order)
            self._orders[index] = epoch, order
        self._drawn[index] += 1
        return tasks[order[place]]


def hold_out(tasks: Sequence[Task], size: float, seed: int) -> tuple[list[Task], list[Task]]:
    """Return the tasks to train on and those held out: a part of the questions, rounded, or from 1 on their number.

    Tasks with the same question stay together.
    """
    questions = list(dict.fromkeys(task.question for task in tasks))
    count = round(size * len(questions)) if size < 1 else min(int(size), len(questions))
    held_out = set(Random(f"validation {seed}").sample(questions, count))
    sides: tuple[list[Task], list[Task]] = ([], [])
    for task in tasks:
        sides[task.question in held_out].append(task)
    return sides


def side_by_side(sources: Sequence[Sequence[Task]]) -> list[Task]:
    """All tasks, each source spread evenly, so that any first so many of them are of all sources."""
    places = [
        ((number + 0.5) / len(tasks), index, task)
        for index, tasks in enumerate(sources)
        for number, task in enumerate(tasks)
    ]
    return [task for _, _, task in sorted(places, key=lambda place: place[:2])]


def read_sources(data: Data, read: Callable[[str, DataSource], list[Task]]) -> tuple[list[TaskSource], list[Task]]:
    """What is trained on and what is held out, of all sources; `read` is given a source's dotted key and the source.

    UserError lists what is wrong with any of them.
    """
    problems: list[str] = []

    def tried(key: str, source: DataSource) -> list[Task]:
        try:
            return read(key, source)
        except UserError as error:
            problems.append(str(error))
            return []

    train, held_out = [], []
    for key, source in data.train_sources.items():
        tasks, others = hold_out(tried(key, source), source.split_validation_size, source.seed)
        if source.split_validation_size and tasks + others and not (tasks and others):
            problems.append(
                f"{key}.split_validation_size {source.split_validation_size:g} of the {len(tasks + others)} tasks in "
                f"{source.data_path} leaves {len(tasks)} to train on and {len(others)} for validation"
            )
        train.append(TaskSource(tasks, source.weight or len(tasks)))
        held_out.append(others)
    held_out += [tried(key, each) for key, each in data.validation_sources.items() if each.data_path is not None]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return train, side_by_side(held_out)
