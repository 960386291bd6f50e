"""How sure a mean over tasks is, and the difference of two over the same tasks: 95 % intervals.

Tasks are the unit: several episodes of one task count as one value, their mean, as they are no independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

import numpy

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_RESAMPLES = 10_000
# Of resamples at once: tasks may be thousands.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its interval. Example: Estimate(0.81, 0.72, 0.88, "wilson")."""

    mean: float
    low: float
    high: float
    method: str

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def estimate(values: Sequence[float], seed: int) -> Estimate:
    """Of one value per task, at least one: Wilson's where all are 0 or 1, else a bootstrap over tasks."""
    if _are_binary(values):
        return Estimate(fmean(values), *_wilson(values), "wilson")
    return Estimate(fmean(values), *_bootstrap(values, seed), "bootstrap")


def difference(values: Sequence[float], others: Sequence[float], seed: int) -> Estimate:
    """Of the means of `values` and `others`, which have one value for each of the same tasks, in the same order.

    Newcombe's where all are 0 or 1, else a bootstrap over the tasks' differences.
    """
    if _are_binary([*values, *others]):
        return Estimate(fmean(values) - fmean(others), *_newcombe(values, others), "newcombe")
    apart = [value - other for value, other in zip(values, others, strict=True)]
    return Estimate(fmean(apart), *_bootstrap(apart, seed), "bootstrap")


def _are_binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _wilson(values: Sequence[float]) -> tuple[float, float]:
    """Wilson 1927, Journal of the American Statistical Association 22, page 209: the score interval."""
    count, share = len(values), fmean(values)
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _newcombe(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Newcombe 1998, Statistics in Medicine 17, page 2635, method 10: of paired shares, from Wilson's intervals.

    Unlike a bootstrap it does not claim to be certain where no task of a few came out differently.
    """
    count, share, other = len(values), fmean(values), fmean(others)
    (low, high), (other_low, other_high) = _wilson(values), _wilson(others)
    both = sum(value and other for value, other in zip(values, others, strict=True))
    only, only_other = sum(values) - both, sum(others) - both
    neither = count - both - only - only_other
    spread = math.sqrt(sum(values) * (count - sum(values)) * sum(others) * (count - sum(others)))
    together = both * neither - only * only_other
    phi = (max(together - count / 2, 0) if together > 0 else together) / spread if spread else 0.0
    down, other_up = share - low, other_high - other
    up, other_down = high - share, other - other_low
    apart = share - other
    return (
        apart - math.sqrt(down**2 - 2 * phi * down * other_up + other_up**2),
        apart + math.sqrt(up**2 - 2 * phi * up * other_down + other_down**2),
    )


def _bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Percentiles of the means of resampled tasks (Efron and Tibshirani 1993, chapter 13)."""
    rng, array = numpy.random.default_rng(seed), numpy.asarray(values, dtype=float)
    means = numpy.concatenate(
        [
            array[rng.integers(len(array), size=(min(_CHUNK, _RESAMPLES - first), len(array)))].mean(axis=1)
            for first in range(0, _RESAMPLES, _CHUNK)
        ]
    )
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
