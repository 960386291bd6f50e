"""Engines beside each other: how fast they sample (generate.py) and take up weights (sync.py).

Each side of each shape in a process of its own, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slurmkit.bench.child import measured
from slurmkit.bench.machine import circumstances
from slurmkit.bench.shapes import shape_of

SIDES = ("transformers", "torch", "vllm")
# Of generate.py, which says what they are.
WORKLOADS = ("even", "rollouts")
ENGINES = SIDES[1:]


def compare(shapes: Sequence[str], given: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of each side for each shape and workload, also divided by transformers'. UserError: an unknown shape."""
    figures, runs = dict[str, Any](), list[Any]()
    for workload in WORKLOADS:
        result = _each("generate", SIDES, shapes, {**given, "workload": workload}, say)
        runs += result["runs"]
        figures |= {f"{shape}, {workload}": found for shape, found in result["figures"].items()}
    for found in figures.values():
        base = found["transformers"]["tokens_per_second"]
        found["ratio_to_transformers"] = {side: found[side]["tokens_per_second"] / base for side in ENGINES}
    return {"figures": figures, "runs": runs}


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The comparison in Markdown."""
    yield "| model, workload | engine | tokens/s | beside transformers | start s |"
    yield "|---|---|---:|---:|---:|"
    for workload, sides in figures.items():
        for side in SIDES:
            rate, start = (sides[side][key] for key in ("tokens_per_second", "start_seconds"))
            ratio = sides["ratio_to_transformers"].get(side, 1.0)
            yield f"| {workload} | {side} | {rate:,.0f} | {ratio:.2f} | {start:.1f} |"


def transfers(shapes: Sequence[str], given: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of new weights to each engine for each shape. UserError for an unknown shape."""
    return _each("sync", ENGINES, shapes, given, say)


def transfer_table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The transfers in Markdown."""
    yield "| model | MiB | engine | policy ms | engine ms | GB/s | a plain copy ms | ratio |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for shape, sides in figures.items():
        for side in ENGINES:
            found = sides[side]
            share, load, copy = (found[f"{key}_seconds"] * 1e3 for key in ("share", "load", "copy"))
            mib, rate = found["bytes"] / 2**20, found["bytes_per_second"] / 1e9
            ratio = found["ratio_to_copy"]
            yield (
                f"| {shape} | {mib:,.0f} | {side} | {share:.1f} | {load:.1f} | {rate:.2f} | {copy:.1f} | {ratio:.2f} |"
            )


def _each(
    module: str, sides: Sequence[str], shapes: Sequence[str], given: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    for shape in shapes:
        shape_of(shape)
    runs, figures = [], dict[str, Any]()
    for shape in shapes:
        figures[shape] = {}
        for side in sides:
            say(", ".join(filter(None, [shape, given.get("workload"), side])))
            run = measured(module, {**given, "shape": shape, "side": side})
            runs.append({**run, "circumstances": circumstances()})
            figures[shape][side] = run["figures"]
    return {"figures": figures, "runs": runs}
