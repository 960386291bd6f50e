"""BFCL v3's overall, by its own rule, or what is missing for it."""

from __future__ import annotations

import pytest

from slurmkit.errors import UserError
from slurmkit.evaluate.bfcl_scores import CATEGORIES, GROUPS, chosen, group_scores, missing

# As bfcl-eval 2026.3.23 has them.
SIZES = dict.fromkeys(CATEGORIES, 200) | {
    "simple_python": 400,
    "simple_java": 100,
    "simple_javascript": 50,
    "irrelevance": 240,
    "live_simple": 258,
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "live_irrelevance": 884,
    "live_relevance": 16,
}


@pytest.mark.parametrize(
    ("category", "share"),
    [
        ("simple_java", 1 / 3 / 5 / 3),  # one of three languages of one of five parts of one of three groups
        ("parallel", 1 / 5 / 3),
        ("irrelevance", 1 / 5 / 3),
        ("live_multiple", 1053 / 2251 / 3),  # by the number of entries
        ("live_relevance", 16 / 2251 / 3),
        ("multi_turn_long_context", 1 / 4 / 3),
    ],
)
def test_the_overall_score_uses_the_category_weights_of_the_leaderboard(category: str, share: float) -> None:
    none = dict.fromkeys(CATEGORIES, 0.0)
    assert group_scores(none, SIZES) == dict.fromkeys([*GROUPS, "overall"], 0.0)
    scores = group_scores({**none, category: 1.0}, SIZES)
    assert scores["overall"] == pytest.approx(share)
    assert [name for name in GROUPS if scores[name]] == [name for name in GROUPS if category in GROUPS[name]]


def test_a_missing_category_omits_the_overall_but_keeps_complete_groups() -> None:
    there = {category: 0.5 for category in CATEGORIES if category != "live_parallel"}
    assert group_scores(there, SIZES) == {"non_live": 0.5, "multi_turn": 0.5}
    assert missing(there) == ["live_parallel"]


def test_categories_accept_names_and_groups_and_suggest_for_a_wrong_name() -> None:
    assert chosen("multi_turn_base, simple_java,simple_java") == ("simple_java", "multi_turn_base")
    assert chosen("all") == CATEGORIES
    assert chosen("single_turn") == GROUPS["non_live"] + GROUPS["live"]
    with pytest.raises(UserError, match=r"--categories multi_turn_bse: BFCL v3 has no .* nearest is multi_turn_base"):
        chosen("multi_turn_bse")
    with pytest.raises(UserError, match="--categories memory_kv: BFCL v3 has no such category"):  # of v4
        chosen("memory_kv")
    with pytest.raises(UserError, match="names none"):
        chosen(",")
