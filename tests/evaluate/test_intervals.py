"""Intervals hold what they promise, and tasks, not episodes, are what they count."""

from __future__ import annotations

from random import Random
from statistics import fmean, stdev

import pytest

from slurmkit.evaluate.intervals import difference, estimate


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, page 857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_has_wilsons_interval(right: int, of: int, low: float, high: float) -> None:
    found = estimate([1.0] * right + [0.0] * (of - right), seed=0)
    assert (found.mean, found.method) == (pytest.approx(right / of), "wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_means_get_a_seeded_bootstrap_interval_over_tasks() -> None:
    rng = Random(1)
    values = [rng.random() for _ in range(400)]
    found = estimate(values, seed=3)
    half = 1.96 * stdev(values) / 400**0.5  # by the central limit theorem
    assert (found.mean, found.method) == (fmean(values), "bootstrap")
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.1 * half)
    assert estimate(values, seed=3) == found != estimate(values, seed=4)


@pytest.mark.parametrize("episodes", [1, 4])
def test_a_95_percent_interval_covers_the_true_paired_difference(episodes: int) -> None:
    rng, held, trials = Random(episodes), 0, 200
    for _ in range(trials):
        ours, theirs = [], []
        for _ in range(40):
            # Tasks differ in difficulty, and the checkpoint is 0.1 better in each.
            hard = rng.uniform(0.1, 0.9)
            for values, share in ((ours, min(1.0, hard + 0.1)), (theirs, hard)):
                values.append(fmean(float(rng.random() < share) for _ in range(episodes)))
        found = difference(ours, theirs, seed=0)
        held += found.low <= 0.1 <= found.high
    assert 0.91 < held / trials < 0.99


def test_a_difference_turns_its_sign_with_its_sides_and_is_paired() -> None:
    ours, theirs = [1.0] * 12 + [0.0] * 8, [1.0] * 8 + [0.0] * 12
    found, turned = difference(ours, theirs, 0), difference(theirs, ours, 0)
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))
    assert found.low > 0  # four tasks gained, none lost
    unpaired = difference(ours, theirs[::-1], 0)
    assert unpaired.mean == pytest.approx(found.mean)
    assert unpaired.low < 0 < unpaired.high


def test_a_few_tasks_that_all_came_out_alike_prove_nothing() -> None:
    found = difference([1.0] * 5, [1.0] * 5, 0)
    assert found.mean == 0
    assert found.low < -0.3
    assert found.high > 0.3
