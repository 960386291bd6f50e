"""A table that never changes: what changes it makes another one, which shares its rows. So all episodes share a world.

Its rows carry labels, as in a DataFrame, because NeMo Gym compares them too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slurmkit.envs.workplace.values import contains, is_missing

# Columns in which upper and lower case differ.
_CASE_MATTERS = frozenset(("status", "list_name", "board"))


class Row:
    """One row. `values` must not be changed; what is made of them is kept, as rows are shared."""

    __slots__ = ("_folded", "_lower", "is_new", "values")

    def __init__(self, values: dict[str, Any], *, is_new: bool = False) -> None:
        self.values = values
        self.is_new = is_new
        """Whether an episode has added it."""
        self._lower: str | None = None
        self._folded: tuple[Any, ...] | None = None

    def lower(self, columns: Sequence[str]) -> str:
        """The text of `columns`, which are the same at every call, in lower case."""
        if self._lower is None:
            self._lower = " ".join(f"{self.values[column]}" for column in columns).lower()
        return self._lower

    @property
    def folded(self) -> tuple[Any, ...]:
        """As NeMo Gym compares it: lower case where case does not matter, and there nothing where it is no text."""
        if self._folded is None:
            self._folded = tuple(_folded(column, value) for column, value in self.values.items())
        return self._folded


def _folded(column: str, value: Any) -> Any:
    if column in _CASE_MATTERS:
        return None if is_missing(value) else value
    return value.lower() if isinstance(value, str) else None


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Example: Table.of(("email_id", "subject"), [{"email_id": "00000001", "subject": "hello"}])."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    labels: tuple[int, ...]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> Table:
        """Rows labelled from 0."""
        kept = tuple(Row(row) for row in rows)
        return cls(tuple(columns), kept, tuple(range(len(kept))))

    def records(self) -> list[dict[str, Any]]:
        """All rows, as they may be told to a model; not to be changed."""
        return [row.values for row in self.rows]

    def holds(self, column: str, value: Any) -> bool:
        """`value in table[column].values`, where a list of one is that one, and of more an error."""
        if isinstance(value, list):
            if len(value) != 1:
                shapes = f"({len(self.rows)},) ({len(value)},)"
                raise ValueError(f"operands could not be broadcast together with shapes {shapes} ")
            value = value[0]
        return any(row.values[column] == value for row in self.rows)

    def where(self, column: str, value: Any) -> list[dict[str, Any]]:
        """The rows whose `column` is `value`."""
        return self.compared(column, operator.eq, value).records()

    def compared(self, column: str, compare: Callable[[Any, Any], bool], value: Any) -> Table:
        """`table[compare(table[column], value)]`; a cell that is empty compares to nothing."""
        if isinstance(value, list):
            raise ValueError("Lengths must match to compare", (len(self.rows),), (len(value),))
        return self._kept(
            not is_missing(cell := row.values[column]) and bool(compare(cell, value)) for row in self.rows
        )

    def containing(self, column: str, pattern: Any) -> Table:
        """`table[table[column].str.contains(pattern, case=False)]`, which cannot do with an empty cell: ValueError."""
        found = contains(pattern)
        matches = [found(row.values[column]) for row in self.rows]
        if None in matches:
            raise ValueError("Cannot mask with non-boolean array containing NA / NaN values")
        return self._kept(bool(match) for match in matches)

    def next_id(self, column: str) -> int:
        """One above the greatest id, which is the last in the order of text."""
        return int(max(row.values[column] for row in self.rows)) + 1

    def without(self, column: str, value: Any) -> Table:
        """All rows but those whose `column` is `value`; labels stay with their rows."""
        if isinstance(value, list):
            raise ValueError("Lengths must match to compare", (len(self.rows),), (len(value),))
        return self._kept(row.values[column] != value for row in self.rows)

    def extended(self, values: dict[str, Any], *, renumber: bool) -> Table:
        """One more row at the end. `renumber` labels all rows from 0; else the new one is another 0."""
        row = Row({column: values[column] for column in self.columns}, is_new=True)
        labels = tuple(range(len(self.rows) + 1)) if renumber else (*self.labels, 0)
        return Table(self.columns, (*self.rows, row), labels)

    def updated(self, column: str, value: Any, field: str, new_value: Any) -> Table:
        """With `new_value` in `field` of the rows whose `column` is `value`; a list of one is that one."""
        if isinstance(new_value, list):
            if len(new_value) != 1:
                raise ValueError("Must have equal len keys and value when setting with an iterable")
            new_value = new_value[0]
        rows = (
            Row({**row.values, field: new_value}, is_new=row.is_new) if row.values[column] == value else row
            for row in self.rows
        )
        return Table(self.columns, tuple(rows), self.labels)

    def _kept(self, keep: Iterable[bool]) -> Table:
        kept = [index for index, wanted in enumerate(keep) if wanted]
        return Table(
            self.columns, tuple(self.rows[index] for index in kept), tuple(self.labels[index] for index in kept)
        )
