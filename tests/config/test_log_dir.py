"""Where a run's logs are: what is refused, and the links that the run directory has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurmkit.config.log_dir import FOLDERS, METRICS, link_logs, problem_with
from slurmkit.grpo.metrics import RunLog
from slurmkit.keeper.meeting import size_of
from slurmkit.report.rows import Tail, read_rows
from tests.support.tiny_model import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def log(run: Path, *steps: int, resume_after: int | None = None) -> None:
    with RunLog(run, tiny_config(run), last_step=9, resume_after=resume_after) as written:
        for step in steps:
            written.write(step, {"val:accuracy": 0.5})


def test_all_logs_are_in_log_dir_and_every_reader_finds_them_in_the_run(run: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    link_logs(run, logs)
    size, tail = size_of(str(run / METRICS)), Tail(run / METRICS, whole=True)
    log(run, 1, 2)
    assert size == -1 < size_of(str(run / METRICS)), "what the watchdog looks at"
    assert [row["step"] for row in tail.read()[0]] == [1, 2]
    log(run, 2, 3, resume_after=1)
    assert [row["step"] for row in read_rows(run).rows] == [1, 2, 3]
    assert (logs / METRICS).read_bytes() == (run / METRICS).read_bytes()
    assert {path.name for path in run.iterdir() if path.is_symlink()} == {METRICS, *FOLDERS}
    assert not (logs / METRICS).is_symlink()


def test_links_are_made_once_and_none_in_a_run_directory_that_is_log_dir(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other name").symlink_to(run)
    link_logs(run, tmp_path / "other name")
    assert list(run.iterdir()) == []
    for _ in range(2):
        link_logs(run, tmp_path / "logs")
    assert os.readlink(run / METRICS) == str(tmp_path / "logs" / METRICS)


def test_a_run_without_logs_may_log_anywhere_but_where_another_run_does(run: Path, tmp_path: Path) -> None:
    (logs := tmp_path / "logs").mkdir()
    (logs / "plots").mkdir()
    for folder in (run, logs, tmp_path / "new" / "deep"):
        assert problem_with(run, folder) is None
    (logs / METRICS).touch()
    assert problem_with(run, logs) == f"it holds {METRICS} of another run: give each run a folder of its own"


def test_a_run_goes_on_logging_where_it_began(run: Path, tmp_path: Path) -> None:
    link_logs(run, tmp_path / "logs")
    for exists in (False, True):
        assert problem_with(run, tmp_path / "logs") is None
        for other in (run, tmp_path / "elsewhere"):
            assert problem_with(run, other) == (
                f"the logs of this run are in {tmp_path}/logs: set it to that folder, or leave it out"
            )
        if not exists:
            log(run, 1)
    (run / METRICS).unlink()
    log(run, 1)
    assert f"are in {run}: " in str(problem_with(run, tmp_path / "elsewhere"))
