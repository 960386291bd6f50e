"""Whether an episode left the databases as the task's own calls leave them: NeMo Gym's way, or a stricter one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from slurmkit.envs.workplace.desk import Desk, changes_something
from slurmkit.envs.workplace.table import Row, Table
from slurmkit.envs.workplace.values import is_missing
from slurmkit.envs.workplace.world import World

Scoring = Literal["gym", "strict"]
Call = tuple[str, str]
"""A tool's name and its arguments, a JSON object as text."""


def end_state(world: World, calls: Iterable[Call]) -> tuple[Table, ...]:
    """What a fresh desk's tables are after the calls. Those that fail are skipped, those that only look left out."""
    desk = Desk(world)
    for name, arguments in calls:
        if changes_something(name):
            try:
                desk.call(name, json.loads(arguments))  # null is passed on here, and by no server: as there
            except Exception:
                continue
    return desk.tables


def failures(world: World, calls: Iterable[Call]) -> Iterable[str]:
    """What is wrong with calls that should all work, one text for each that does not."""
    desk = Desk(world)
    for name, arguments in calls:
        found, worked = desk.answer(name, json.loads(arguments))
        if not worked:
            yield f"{name}({arguments}) fails: {found}"


def same(first: Sequence[Table], second: Sequence[Table], scoring: Scoring) -> bool:
    """Whether two end states are equal.

    gym: as DataFrames whose text is lower-case but for status, list_name and board: the same rows in the same order
    under the same labels. What should be text and is none equals whatever else is none.
    strict: the same rows in any order, under the ids that they have in the world; rows that were added are compared
    without their ids, and values that are no text by what they are. Case matters as in gym.
    """
    equal = _as_frames if scoring == "gym" else _as_sets
    return all(one is other or equal(one, other) for one, other in zip(first, second, strict=True))


def reward(
    start: Sequence[Table],
    predicted: Sequence[Table],
    gold: Sequence[Table],
    scoring: Scoring,
    *,
    looked: bool,
) -> float:
    """1.0 where the end states are the same, else 0.0.

    strict: where nothing was to be changed, only an episode that `looked`, that is in which some tool did what it was
    asked, has found that out; doing nothing at all is worth 0.0.
    """
    if not same(predicted, gold, scoring):
        return 0.0
    return float(scoring == "gym" or looked or not same(start, gold, "strict"))


def _as_frames(one: Table, other: Table) -> bool:
    return one.labels == other.labels and all(
        first is second or first.folded == second.folded for first, second in zip(one.rows, other.rows, strict=True)
    )


def _as_sets(one: Table, other: Table) -> bool:
    shared = {id(row) for row in one.rows} & {id(row) for row in other.rows}
    return _contents(one, shared) == _contents(other, shared)


def _contents(table: Table, shared: set[int]) -> Counter[str]:
    return Counter(_content(row) for row in table.rows if id(row) not in shared)


def _content(row: Row) -> str:
    values = list(row.values.values())
    kept = [
        folded if isinstance(value, str) else None if is_missing(value) else value
        for value, folded in zip(values, row.folded, strict=True)
    ]
    has_own_id = row.is_new and len(kept) > 1  # plots have none
    return json.dumps([row.is_new, *(kept[1:] if has_own_id else kept)])
