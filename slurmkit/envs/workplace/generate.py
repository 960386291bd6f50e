"""`python -m slurmkit.envs.workplace.generate OPTIONS`, as JSON: what `slurmkit data workplace` starts.

Tasks in NeMo Gym's format over a made-up company. The same options write the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from slurmkit.envs.workplace.company import make_world
from slurmkit.envs.workplace.definitions import DEFINITIONS, compact
from slurmkit.envs.workplace.desk import Desk, changes_something
from slurmkit.envs.workplace.families import FAMILIES, Draft, Draw
from slurmkit.envs.workplace.scoring import Call, end_state, failures, same
from slurmkit.envs.workplace.tasks import PROMPT
from slurmkit.envs.workplace.world import World
from slurmkit.errors import SlurmkitError, UserError

# Draws in a row that come to no new task: a company has only so many.
_ATTEMPTS = 3000


def drafts(world: World, families: Sequence[str], seed: int) -> Iterator[tuple[str, Draft]]:
    """Tasks without end, each family in turn and no question twice, each with its family.

    UserError where no more can be found.
    """
    draw, seen, failed, number = Draw(world, Random(f"workplace tasks {seed}")), set[str](), 0, 0
    start = Desk(world).tables
    while failed < _ATTEMPTS:
        family = families[number % len(families)]
        draft = FAMILIES[family](draw)
        if draft is None or draft.question in seen or not _is_sound(world, start, draft):
            failed += 1
            # A family that has run dry does not hold up the others.
            number += failed % 50 == 0
            continue
        seen.add(draft.question)
        failed, number = 0, number + 1
        yield family, draft
    raise UserError(f"--tasks: the company has no more than {len(seen)} tasks of {', '.join(families)}")


def _is_sound(world: World, start: Any, draft: Draft) -> bool:
    """Whether all calls work, and change something by either way of comparing."""
    if any(True for _ in failures(world, draft.calls)):
        return False
    end = end_state(world, draft.calls)
    return not same(start, end, "gym") and not same(start, end, "strict")


def few_tools(calls: Sequence[Call]) -> list[Mapping[str, Any]]:
    """The tools that are called, with those of their arguments that are given."""
    used: dict[str, set[str]] = {}
    for name, arguments in calls:
        used.setdefault(name, set()).update(json.loads(arguments))
    return [compact(name, used[name]) for name in sorted(used)]


def row(number: int, family: str, draft: Draft, *, few: bool) -> dict[str, Any]:
    """As NeMo Gym's data sets have it, with all 27 tools or a `few`."""
    said = [{"role": "user", "content": draft.question}]
    if not few:
        said.insert(0, {"role": "system", "content": PROMPT})
    return {
        "id": number,
        "responses_create_params": {
            "input": said,
            "tools": few_tools(draft.calls) if few else list(DEFINITIONS.values()),
            "parallel_tool_calls": False,
            "temperature": 1.0,
        },
        "ground_truth": [_as_gold(call) for call in draft.calls if changes_something(call[0])],
        "category": f"workplace_assistant_{family.replace('-', '_')}",
        "environment_name": "workplace_assistant",
    }


def _as_gold(call: Call) -> Mapping[str, str]:
    return {"name": call[0], "arguments": call[1]}


def write(options: Mapping[str, Any]) -> None:
    """Write one or two files: no task of `validation` is in `out`. UserError for families that there are not."""
    families = options.get("families") or list(FAMILIES)
    for family in families:
        if family not in FAMILIES:
            raise UserError(f"--families {family}: there are {', '.join(FAMILIES)}")
    world = make_world(options["world_seed"])
    found = drafts(world, families, options["seed"])
    counts = {options["out"]: options["tasks"]}
    if options.get("validation"):
        counts = {options["validation"]: options["validation_tasks"], **counts}
    for path, count in counts.items():
        rows = (row(i, *next(found), few=options["few_tools"]) for i in range(count))
        _replace(Path(path), "".join(json.dumps(each) + "\n" for each in rows))
        print(f"{path}: {count} tasks")
    if options.get("databases"):
        world.write(Path(options["databases"]))
        print(f"{options['databases']}: the company's databases")


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    try:
        write(json.loads(sys.argv[1]))
    except SlurmkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
