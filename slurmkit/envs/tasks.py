"""Where tasks come from: JSON lines, and an order that can be taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from slurmkit.envs.environment import Task
from slurmkit.errors import UserError


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of every line of a JSONL file, blank lines left out.

    Raises UserError with file and line where a line is no JSON object or one of `fields` is missing or no text, and
    with the file where it cannot be read or holds no row.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: holds no task")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, found {type(row).__name__}")
        for field in fields:
            if not isinstance(row.get(field), str):
                found = ", ".join(row) or "none"
                raise UserError(f"{path}:{number}: the key {field!r} must hold text (keys: {found})")
        yield number, row


class TaskOrder:
    """An endless, reproducible order of tasks whose whole state is one number.

    Each epoch is a permutation that follows from (seed, epoch), so the place reached says everything: an interrupted
    run draws the same tasks as one that was not.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool, position: int = 0) -> None:
        """`position`: how many tasks were drawn before, over all epochs."""
        self._tasks = tasks
        self._seed = seed
        self._shuffle = shuffle
        self.position = position
        self._epoch = -1
        self._order: list[int] = []

    @property
    def digest(self) -> str:
        """SHA-256 of all tasks: a position is worth nothing in another data set."""
        digest = hashlib.sha256()
        for task in self._tasks:
            digest.update(json.dumps([task.name, task.question, task.answer]).encode())
        return digest.hexdigest()

    def draw(self, count: int) -> list[Task]:
        """The next `count` tasks, across the end of an epoch where it comes to that."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Task:
        epoch, index = divmod(self.position, len(self._tasks))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._tasks)))
            if self._shuffle:
                Random(f"{self._seed} epoch {epoch}").shuffle(self._order)
        self.position += 1
        return self._tasks[self._order[index]]
