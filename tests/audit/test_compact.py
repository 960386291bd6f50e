"""The configuration inside a script: complete, short, and the same data for every reader of YAML."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmkit.config.compact import compact_yaml
from slurmkit.config.yaml12 import parse_value
from tests.support.requirements import HOSTILE

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        *HOSTILE,
        "true",
        "No",
        "~",
        "null",
        "1e3",
        "0x1",
        "1:30",
        "-",
        "x: y",
        "[a",
        "\x85",
        "\ufeff",
        "\u2028",
        "=",
        "<<",
    ]
)
KEYS = st.from_regex(r"[a-z_][A-Za-z0-9_./-]{0,30}", fullmatch=True) | st.sampled_from(
    ["no", "A B", "1", "x: y", "é", "'"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=40,
)


@settings(max_examples=60, deadline=None)
@given(data=st.dictionaries(KEYS, VALUES, max_size=6))
def test_compact_yaml_parses_to_the_same_data_as_yaml_1_1_and_1_2(data: dict[str, Any]) -> None:
    text = compact_yaml(data)
    assert (parse_value(text) or {}) == data
    assert (yaml.safe_load(text) or {}) == data


def test_compact_yaml_fills_lines_and_breaks_only_groups_that_do_not_fit() -> None:
    data = {"a": {f"key_{i}": i for i in range(12)}, "b": {"c": "x y", "long": {"k" * 60: 1, "l" * 60: [1, 2.0]}}}
    assert compact_yaml(data).splitlines() == [
        "a: {" + " ".join(f"key_{i}: {i}," for i in range(11)),
        "  key_11: 11}",
        'b: {c: "x y",',
        f"  long: {{{'k' * 60}: 1,",
        f"    {'l' * 60}: [1, 2.0]}}}}",
    ]
