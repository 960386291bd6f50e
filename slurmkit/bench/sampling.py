"""Comparisons of engines: how fast they sample (generate.py) and load new weights (sync.py).

Each side of each shape runs in a process of its own, one after the other, and all of them once for each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from slurmkit.bench import equal_work
from slurmkit.bench.child import measured
from slurmkit.bench.machine import circumstances
from slurmkit.bench.shapes import shape_of

SIDES = ("transformers", "torch", "vllm")
# Of generate.py, which says what they are.
WORKLOADS = ("even", "rollouts")
_BASE, *_OTHERS = SIDES
ENGINES = tuple(_OTHERS)


def compare(
    shapes: Sequence[str], seeds: Sequence[int], given: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Return tokens/s of each side for each shape and workload, and the ratio of each engine's to transformers'.

    Figures are medians over the seeds; the ratio is taken seed by seed. If the tokens of a round differ by more than
    5 % between an engine and transformers, "unequal" says how, and there is no ratio. UserError for an unknown shape.
    """
    figures, runs = dict[str, Any](), list[Any]()
    for workload in WORKLOADS:
        for seed in seeds:
            runs += _each("generate", SIDES, shapes, {**given, "workload": workload, "seed": seed}, say)
    for workload in WORKLOADS:
        for shape in shapes:
            sides = {side: _figures(runs, shape=shape, side=side, workload=workload) for side in SIDES}
            figures[f"{shape}, {workload}"] = _compared(sides, seeds)
    return {"figures": figures, "runs": runs}


def _compared(sides: Mapping[str, Sequence[Mapping[str, float]]], seeds: Sequence[int]) -> dict[str, Any]:
    compared: dict[str, Any] = {
        side: {
            key: median(each[key] for each in found)
            for key in ("tokens_per_second", "tokens_per_round", "start_seconds", "parameters")
        }
        for side, found in sides.items()
    }
    compared["ratio_to_transformers"], compared["unequal"] = {}, {}
    base = sides[_BASE]
    for engine in ENGINES:
        unequal = [
            f"seed {seed}: {problem}"
            for seed, theirs, ours in zip(seeds, base, sides[engine], strict=True)
            if (
                problem := equal_work.difference(
                    {
                        side: {"tokens a round": each["tokens_per_round"]}
                        for side, each in ((_BASE, theirs), (engine, ours))
                    }
                )
            )
        ]
        if unequal:
            compared["unequal"][engine] = unequal
            continue
        rates = ([each["tokens_per_second"] for each in found] for found in (sides[engine], base))
        compared["ratio_to_transformers"][engine] = equal_work.ratios(*rates)
    return compared


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the comparison in Markdown."""
    yield "| model, workload | engine | tokens a round | tokens/s | ratio to transformers | start s |"
    yield "|---|---|---:|---:|---:|---:|"
    for workload, sides in figures.items():
        for side in SIDES:
            rate, tokens, start = (
                sides[side][key] for key in ("tokens_per_second", "tokens_per_round", "start_seconds")
            )
            found = sides["ratio_to_transformers"].get(side)
            ratio = equal_work.shown(found) if found else "unequal" if side in sides["unequal"] else "1"
            yield f"| {workload} | {side} | {tokens:,.0f} | {rate:,.0f} | {ratio} | {start:.1f} |"
    yield "Ratios are medians (least–most) over the seeds."
    for workload, sides in figures.items():
        for side, problems in sides["unequal"].items():
            for problem in problems:
                yield f"{workload}, {side}, {problem}: the work is unequal, so there is no ratio."


def transfers(shapes: Sequence[str], given: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Return the seconds that new weights take to each engine for each shape. UserError for an unknown shape."""
    runs = _each("sync", ENGINES, shapes, given, say)
    figures = {
        shape: {side: _figures(runs, shape=shape, side=side)[0] for side in ENGINES} for shape in dict.fromkeys(shapes)
    }
    return {"figures": figures, "runs": runs}


def transfer_table(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the transfers in Markdown."""
    yield "| model | MiB | engine | policy ms | engine ms | GB/s | a plain copy ms | ratio |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for shape, sides in figures.items():
        for side in ENGINES:
            found = sides[side]
            share, load, copy = (found[f"{key}_seconds"] * 1e3 for key in ("share", "load", "copy"))
            mib, rate = found["bytes"] / 2**20, found["bytes_per_second"] / 1e9
            ratio = equal_work.shown(found["ratio_to_copy"])
            yield f"| {shape} | {mib:,.0f} | {side} | {share:.1f} | {load:.1f} | {rate:.2f} | {copy:.1f} | {ratio} |"
    yield "Ratios are medians (least–most) over the rounds."


def _each(
    module: str, sides: Sequence[str], shapes: Sequence[str], given: Mapping[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    for shape in shapes:
        shape_of(shape)
    runs = []
    for shape in shapes:
        for side in sides:
            words = [shape, given.get("workload"), f"seed {given['seed']}" if "seed" in given else None, side]
            say(", ".join(filter(None, words)))
            circumstance = circumstances()
            run = measured(module, {**given, "shape": shape, "side": side})
            runs.append({**run, "circumstances": circumstance})
    return runs


def _figures(runs: Sequence[Mapping[str, Any]], **settings: str) -> list[dict[str, Any]]:
    """Return the figures of the runs that have these settings, in order."""
    return [run["figures"] for run in runs if settings.items() <= run["settings"].items()]
