"""slurmkit data workplace: tasks that can be done, the same ones from the same seed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.data import Data, WorkplaceEnv
from slurmkit.envs.workplace.domain import Workplace
from slurmkit.envs.workplace.families import FAMILIES
from slurmkit.envs.workplace.scoring import end_state, reward
from slurmkit.envs.workplace.tasks import Goal
from tests.support.requirements import SLURMKIT


def make(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SLURMKIT, "data", "workplace", *arguments], cwd=here, capture_output=True, text=True, timeout=120
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("made")
    words = ["--tasks", "84", "--seed", "5", "--validation", "val.jsonl", "--validation-tasks", "28"]
    done = make(here, *words, "--out", "train.jsonl", "--databases", "company")
    assert done.returncode == 0, done.stderr
    return here


def test_every_family_makes_tasks_and_none_is_on_both_sides(made: Path) -> None:
    train, validation = rows(made / "train.jsonl"), rows(made / "val.jsonl")
    assert {row["category"] for row in train} == {
        f"workplace_assistant_{family.replace('-', '_')}" for family in FAMILIES
    }
    questions = [row["responses_create_params"]["input"][-1]["content"] for row in train + validation]
    assert len(set(questions)) == 84 + 28


@pytest.mark.parametrize("databases", [None, "company"])
def test_each_task_is_read_and_its_calls_change_what_nothing_else_does(made: Path, databases: str | None) -> None:
    config = WorkplaceEnv(databases=databases and str(made / databases))
    domain = Workplace(config, Data.model_validate({"train": {"data_path": str(made / "train.jsonl")}}))
    assert len(domain.train_tasks) == 84
    for task in domain.train_tasks:
        gold = end_state(domain.world, Goal.of(task.answer).calls)
        for scoring in ("gym", "strict"):
            assert reward(domain.start, gold, gold, scoring, looked=False) == 1  # type: ignore[arg-type]
            assert reward(domain.start, domain.start, gold, scoring, looked=True) == 0  # type: ignore[arg-type]


def test_the_same_seed_writes_the_same_bytes_and_another_one_other_tasks(made: Path, tmp_path: Path) -> None:
    words = ["--tasks", "84", "--validation", "val.jsonl", "--validation-tasks", "28", "--out", "train.jsonl"]
    assert make(tmp_path, *words, "--seed", "5").returncode == 0
    assert (tmp_path / "train.jsonl").read_bytes() == (made / "train.jsonl").read_bytes()
    assert (tmp_path / "val.jsonl").read_bytes() == (made / "val.jsonl").read_bytes()
    assert make(tmp_path, *words, "--seed", "6").returncode == 0
    assert (tmp_path / "train.jsonl").read_bytes() != (made / "train.jsonl").read_bytes()


def test_with_few_tools_a_row_carries_those_that_it_needs(tmp_path: Path) -> None:
    words = ["--tasks", "4", "--out", "few.jsonl", "--families", "cancel-event", "--few-tools"]
    assert make(tmp_path, *words).returncode == 0
    for row in rows(tmp_path / "few.jsonl"):
        names = [tool["name"] for tool in row["responses_create_params"]["tools"]]
        assert names == ["calendar_delete_event", "calendar_search_events"]
        assert [call["name"] for call in row["ground_truth"]] == ["calendar_delete_event"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--families", "juggle"], "--families juggle: there are delete-email"),
        (["--families", "delete-email", "--tasks", "9999"], "--tasks: the company has no more than"),
        (["--validation", "x.jsonl"], "--validation x.jsonl is --out as well"),
        (["--out", "/proc/nowhere/x.jsonl"], "/proc/nowhere/x.jsonl: cannot be written"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    done = make(tmp_path, "--tasks", "4", "--out", "x.jsonl", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
