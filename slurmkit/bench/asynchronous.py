"""Asynchronous training compared with synchronous, in an environment whose episodes take long-tailed times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from slurmkit.bench import equal_work
from slurmkit.bench.child import measured
from slurmkit.bench.machine import circumstances

_SYNCHRONOUS = 0
# Amounts of work, which must be equal, and their names in tables.
_WORK = {
    "completion_tokens_per_step": "completion tokens a step",
    "trained_tokens_per_step": "trained tokens a step",
    "episode_seconds_per_step": "seconds of episodes a step",
}


def compare(
    ages: Sequence[int], seeds: Sequence[int], given: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the medians of each age over the seeds, and the ratio of its tokens/s to those of age 0.

    Age 0 is always measured. The ages of one seed run one after the other, so that other load affects all of them. The
    ratio is taken seed by seed. If the work of a seed differs by more than 5 % from that of age 0, "unequal" says how,
    and there is no ratio.
    """
    ages = sorted({_SYNCHRONOUS, *ages})
    runs = []
    for seed in seeds:
        for age in ages:
            say(f"seed {seed}: age {age}")
            circumstance = circumstances()
            run = measured("slow_episodes", {**given, "seed": seed, "age": age})
            runs.append({**run, "circumstances": circumstance})
    by_age = {age: [run["figures"] for run in runs if run["settings"]["age"] == age] for age in ages}
    figures = dict[str, Any]()
    for age, found in by_age.items():
        row: dict[str, Any] = {name: median(each[name] for each in found) for name in found[0]}
        unequal = [
            f"seed {seed}: {problem}"
            for seed, base, each in zip(seeds, by_age[_SYNCHRONOUS], found, strict=True)
            if (problem := equal_work.difference({f"age {_SYNCHRONOUS}": _work(base), f"age {age}": _work(each)}))
        ]
        if unequal:
            row["unequal"] = unequal
        else:
            rates = ([each["tokens_per_second"] for each in side] for side in (found, by_age[_SYNCHRONOUS]))
            row["ratio_to_synchronous"] = equal_work.ratios(*rates)
        row["last_reward_by_seed"] = [each["last_reward"] for each in found]
        figures[f"age {age}"] = row
    return {"figures": figures, "runs": runs}


def _work(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figures[key] for key, name in _WORK.items()}


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the comparison in Markdown."""
    yield "| | tokens/s | ratio to age 0 | s a step | trainer idle | engines idle | mean age | reward, first to last |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, found in figures.items():
        ratio = equal_work.shown(found["ratio_to_synchronous"]) if "ratio_to_synchronous" in found else "unequal"
        yield (
            f"| {name} | {found['tokens_per_second']:,.0f} | {ratio} "
            f"| {found['step_seconds']:.2f} | {found['trainer_idle']:.0%} | {found['engines_idle']:.0%} "
            f"| {found['age_mean']:.2f} | {found['first_reward']:.2f} to {found['last_reward']:.2f} |"
        )
    for name, found in figures.items():
        if ratio := found.get("ratio_to_synchronous"):
            yield f"{name}: ratio is the median (least–most) of {ratio['n']} seeds."
        for problem in found.get("unequal", ()):
            yield f"{name}, {problem}: the work is unequal, so there is no ratio."
