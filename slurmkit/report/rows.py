"""What metrics.jsonl says, line by line, while it is written and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.errors import UserError

# What a step's seconds are spent on, in the order of a step; they add up to time:step.
PHASES = ("rollout", "logprobs", "update", "weights", "validation", "checkpoint", "other")

Row = dict[str, float]


class Rows(NamedTuple):
    """The lines of one run, in order of their steps."""

    rows: Sequence[Row]
    num_unreadable: int
    """Whole lines that hold no step's figures."""

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every step that has the figure."""
        return [(row["step"], row[name]) for row in self.rows if name in row]


def read_rows(run_directory: Path) -> Rows:
    """All whole lines of a run's metrics.jsonl. UserError where the file cannot be read.

    What is no finite number is left out, a line that holds no step is counted: a page is drawn from the rest.
    """
    path = run_directory / "metrics.jsonl"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    # A run writes whole lines; one without its end is still being written.
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    found = [row for line in lines if (row := row_of(line))]
    return Rows(sorted(found, key=lambda row: row["step"]), len(lines) - len(found))


def row_of(line: bytes) -> Row:
    """The finite numbers of one line, {} where it holds no step."""
    try:
        read = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(read, dict):
        return {}
    row = {name: value for name, value in read.items() if _is_figure(value)}
    return row if "step" in row else {}


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Tail:
    """Reads what was appended to a metrics.jsonl since the last time."""

    def __init__(self, path: Path, *, whole: bool) -> None:
        """`whole`: the first time, too; else what is there already is not read."""
        self._path = path
        self._inode, size = self._identify()
        self._offset = 0 if whole else size

    def read(self) -> tuple[list[Row], bool]:
        """The new lines that are whole, and whether they stand in the place of all that were read before."""
        inode, size = self._identify()
        # A resumed run begins by taking back the lines after its checkpoint.
        is_anew = inode != self._inode or size < self._offset
        if is_anew:
            self._inode, self._offset = inode, 0
        if size == self._offset:
            return [], is_anew
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [row for line in whole.splitlines() if (row := row_of(line))], is_anew

    def _identify(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_size
