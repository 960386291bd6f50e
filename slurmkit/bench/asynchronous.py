"""Asynchronous training beside synchronous, in an environment whose episodes take long-tailed times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from slurmkit.bench.child import measured
from slurmkit.bench.machine import circumstances

_SYNCHRONOUS = 0


def compare(
    ages: Sequence[int], seeds: Sequence[int], given: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """For each age the means over the seeds, and tokens/s divided by those of age 0, which is always measured.

    The ages of one seed come one after the other, so that what the machine does otherwise meets all of them.
    """
    ages = sorted({_SYNCHRONOUS, *ages})
    runs = []
    for seed in seeds:
        for age in ages:
            say(f"seed {seed}: age {age}")
            run = measured("slow_episodes", {**given, "seed": seed, "age": age})
            runs.append({**run, "circumstances": circumstances()})
    figures = {}
    for age in ages:
        own = [run["figures"] for run in runs if run["settings"]["age"] == age]
        figures[f"age {age}"] = {name: fmean(each[name] for each in own) for name in own[0]}
    base = figures[f"age {_SYNCHRONOUS}"]["tokens_per_second"]
    for found in figures.values():
        found["ratio_to_synchronous"] = found["tokens_per_second"] / base
    return {"figures": figures, "runs": runs}


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The comparison in Markdown."""
    yield "| | tokens/s | beside age 0 | s a step | trainer idle | engines idle | mean age | reward, first to last |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, found in figures.items():
        yield (
            f"| {name} | {found['tokens_per_second']:,.0f} | {found['ratio_to_synchronous']:.2f} "
            f"| {found['step_seconds']:.2f} | {found['trainer_idle']:.0%} | {found['engines_idle']:.0%} "
            f"| {found['age_mean']:.2f} | {found['first_reward']:.2f} to {found['last_reward']:.2f} |"
        )
