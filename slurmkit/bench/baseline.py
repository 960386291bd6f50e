"""Figures kept as JSON, and what became of them since."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slurmkit.errors import UserError

# How much worse a figure may be before it is called so, as prime-rl's benchmarks have it.
_MEMORY, _THROUGHPUT = 0.01, 0.15


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.unfinished")
    beside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    """A saved result. UserError where it is none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {path}: no baseline: {error}") from None
    if not isinstance(result, dict) or "figures" not in result:
        raise UserError(f"--compare {path}: no baseline: it has no figures; --save-baseline writes one")
    return result


def compare(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    """One line for each figure of memory (MiB) and throughput (tokens/s) that both have, after what differs besides.

    Memory may grow by 1 %, throughput fall by 15 %, before a line says `worse`.
    """
    for what in ("benchmark", "settings", "machine", "versions"):
        mine, theirs = result.get(what), baseline.get(what)
        if mine != theirs:
            yield f"differs    {what}: {_difference(mine, theirs)}"
    old = dict(_figures(baseline["figures"]))
    for name, value in _figures(result["figures"]):
        if name not in old or not old[name]:
            continue
        change = value / old[name] - 1
        worse = change > _MEMORY if name.endswith("_mib") else change < -_THROUGHPUT
        better = change < -_MEMORY if name.endswith("_mib") else change > _THROUGHPUT
        verdict = "worse" if worse else "better" if better else "as before"
        yield f"{verdict:<10} {name}: {value:,.1f}, was {old[name]:,.1f} ({change:+.1%})"


def _figures(figures: Any, above: str = "") -> Iterator[tuple[str, float]]:
    """The figures that are compared, with the keys that lead to them."""
    if not isinstance(figures, dict):
        return
    for key, value in figures.items():
        name = f"{above}.{key}" if above else key
        if key.endswith(("_mib", "tokens_per_second")) and isinstance(value, (int, float)):
            yield name, float(value)
        yield from _figures(value, name)


def _difference(mine: Any, theirs: Any) -> str:
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return f"{mine}, was {theirs}"
    names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {mine.get(name)}, was {theirs.get(name)}" for name in names)
