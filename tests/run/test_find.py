"""The job that a RUN stands for, where a command takes a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slurmkit.errors import UserError
from slurmkit.run.find import find_job


def make_run(folder: Path, *attempts: dict[str, str], began: tuple[str, ...] = ()) -> Path:
    for name in began:
        (folder / "attempts" / name).mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"identity": {}, "attempts": attempts}))
    return folder


def test_a_run_stands_for_its_newest_job(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", {"job_id": "9"}, {"local": "local-1"}, {"job_id": "12"}, began=("9.0", "local-1"))
    assert [find_job(text, tmp_path) for text in ("x", str(run), "9", "12_3", "77")] == ["12", "12", "9", "12_3", "77"]
    (run / "attempts/13.0").mkdir()
    assert find_job("x", tmp_path) == "13"
    make_run(tmp_path / "77", {"job_id": "5"})
    assert find_job("77", tmp_path) == "5"


def test_an_array_stands_for_itself_not_for_a_task(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", {"job_id": "20"}, began=("22.0",))
    (run / "attempts/22.0/start.json").write_text(json.dumps({"array": ["20", 1]}))
    assert find_job("x", tmp_path) == "20"


def test_a_run_without_a_job_and_an_unknown_run_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "here", {"local": "local-1"}, began=("local-1",))
    with pytest.raises(UserError, match=r"/here: nothing to compare, no job of this run was submitted to Slurm"):
        find_job("here", tmp_path)
    with pytest.raises(UserError, match=r"her: no run of that name in .*; the nearest are here"):
        find_job("her", tmp_path)
