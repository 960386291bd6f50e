"""BFCL v3's categories, and how its overall follows from them.

The rule is that of the leaderboard's own code as it was before version 4: `generate_leaderboard_csv` in
berkeley-function-call-leaderboard/bfcl_eval/eval_checker/eval_runner_helper.py of github.com/ShishirPatil/gorilla at
commit cd9429ccf3d4d04156affe883c495b3b047e6b64 of 7 August 2025. Version 4 took the irrelevance categories out of the
groups and gave agents' categories 40 % of the overall, so its figures are other ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from statistics import fmean

from slurmkit.errors import UserError

GROUPS: Mapping[str, tuple[str, ...]] = {
    "non_live": (
        "simple_python",
        "simple_java",
        "simple_javascript",
        "multiple",
        "parallel",
        "parallel_multiple",
        "irrelevance",
    ),
    "live": (
        "live_simple",
        "live_multiple",
        "live_parallel",
        "live_parallel_multiple",
        "live_irrelevance",
        "live_relevance",
    ),
    "multi_turn": ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context"),
}
CATEGORIES = tuple(category for group in GROUPS.values() for category in group)
_SIMPLE = CATEGORIES[:3]
_NAMED = {**GROUPS, "single_turn": GROUPS["non_live"] + GROUPS["live"], "all": CATEGORIES}


def chosen(text: str) -> tuple[str, ...]:
    """The categories that NAME,NAME means, groups included, in the leaderboard's order. UserError for another name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _NAMED and name not in CATEGORIES:
            near = get_close_matches(name, [*_NAMED, *CATEGORIES], 1)
            raise UserError(
                f"--categories {name}: BFCL v3 has no such category"
                + (f"; the nearest is {near[0]}" if near else "")
                + f". There are {', '.join(_NAMED)}, and {', '.join(CATEGORIES)}"
            )
    if not names:
        raise UserError(f"--categories {text!r}: names none; all of v3 is all")
    wanted = {category for name in names for category in _NAMED.get(name, (name,))}
    return tuple(category for category in CATEGORIES if category in wanted)


def missing(categories: Iterable[str]) -> list[str]:
    """What the overall would still need."""
    there = set(categories)
    return [category for category in CATEGORIES if category not in there]


def group_scores(accuracy: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Of each group whose categories are all there, its score; and `overall` where all groups are.

    `sizes` counts a category's entries in the benchmark, not those that were asked.
    """
    found = {}
    if _has(accuracy, GROUPS["non_live"]):
        simple = fmean(accuracy[category] for category in _SIMPLE)
        found["non_live"] = fmean([simple, *(accuracy[each] for each in GROUPS["non_live"][len(_SIMPLE) :])])
    if _has(accuracy, GROUPS["live"]):
        live = GROUPS["live"]
        found["live"] = fmean([accuracy[each] for each in live], [sizes[each] for each in live])
    if _has(accuracy, GROUPS["multi_turn"]):
        found["multi_turn"] = fmean(accuracy[category] for category in GROUPS["multi_turn"])
    if len(found) == len(GROUPS):
        found["overall"] = fmean(found.values())
    return found


def _has(accuracy: Mapping[str, float], categories: Sequence[str]) -> bool:
    return all(category in accuracy for category in categories)
