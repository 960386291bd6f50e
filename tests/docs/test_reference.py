"""The reference pages are made from the keys: each key with its type, default and meaning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slurmkit.config.schema import TrainConfig
from slurmkit.config.source import leaves
from slurmkit.job.reference import pages
from slurmkit.job.settle import Request, settle
from tests.support.requirements import REPOSITORY


def rows_of(page: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning by dotted key, as a reader of the page finds them."""
    found, prefix = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            prefix = line[3:] + "."
        elif row := re.fullmatch(r"\| `(\w+)` \| (.+?) \| (.+?) \| (.+) \|", line):
            assert prefix + row[1] not in found
            found[prefix + row[1]] = (row[2], row[3], row[4])
    return found


@pytest.mark.parametrize("name", ["configuration.md", "job-keys.md"])
def test_a_page_in_the_repository_is_what_the_keys_make_of_it(name: str) -> None:
    written = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    assert written == pages()[name], "other keys: python -m slurmkit.job.reference docs"


def test_the_reference_lists_every_key_of_a_run_with_its_default() -> None:
    rows = rows_of(pages()["configuration.md"])
    train = TrainConfig.model_validate({"policy": {"from_scratch": {}}, "env": {"name": "arithmetic"}})
    found = dict(leaves(train.model_dump(mode="json")))
    assert len(found) > 150
    for key, value in found.items():
        if key != "env.name":
            assert rows[key][1] == f"`{json.dumps(value)}`", key
    assert rows["env.name"][:2] == ("`arithmetic`, `math`, `workplace`, `gym`", "must be given")
    assert rows["grpo.max_broken_fraction"][0] == "number > 0 and ≤ 1"


def test_every_key_of_a_job_is_on_its_page(tmp_path: Path) -> None:
    rows = rows_of(pages()["job-keys.md"])
    spec = settle(Request(partial=True), tmp_path, {}).spec
    for key, _ in leaves(spec.model_dump(mode="json")):
        assert key in rows, key
    assert rows["nodes"] == ("whole number ≥ 1 and ≤ 10,000", "`1`", "Number of nodes.")
    assert "secrets.NAME.file" in rows
