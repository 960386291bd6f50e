"""Checks that the sides of a comparison did equal work, and the spread of their ratio over repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

# The largest share by which the amounts of two sides may differ.
TOLERANCE = 0.05


def difference(work: Mapping[str, Mapping[str, float]]) -> str:
    """Return the amount of work that differs between the sides by more than 5 %, or "" if none does.

    Example: difference({"slurmkit": {"tokens a step": 2915.0}, "trl": {"tokens a step": 6283.0}}) is
    "tokens a step: slurmkit 2,915, trl 6,283".
    """
    for name in next(iter(work.values())):
        amounts = {side: each[name] for side, each in work.items()}
        least, most = min(amounts.values()), max(amounts.values())
        if least <= 0 or most > (1 + TOLERANCE) * least:
            return f"{name}: " + ", ".join(f"{side} {amount:,.0f}" for side, amount in amounts.items())
    return ""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least, the most and the number of the values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the spread of ours divided by theirs, repetition by repetition."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def shown(found: Mapping[str, float]) -> str:
    """Return a spread as text, such as "2.10 (1.95–2.31)"."""
    return f"{found['median']:.2f} ({found['least']:.2f}–{found['most']:.2f})"
