"""A job array is shown as one: the state of all its tasks together."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slurmkit.run.logs import Reader
from slurmkit.run.state import Queue, RunState, read_states
from tests.support.requirements import SLURMKIT
from tests.support.run_directories import Made, Slurm, job


def made(tmp_path: Path) -> Made:
    """Tasks 0 and 1 of three have ended, the second with 7. The last task has the id of the array."""
    run = Made(tmp_path / "run", "array=0-2").record("12")
    for task, (job_id, code) in enumerate((("13", 0), ("14", 7))):
        run.start(f"{job_id}.0", 90, array=["12", task]).end(f"{job_id}.0", 30, code, "done")
    return run


def state_of(run: Made, slurm: Slurm | None) -> RunState:
    return read_states([run.path], Queue(slurm), run.now)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("last", "slurm", "state", "reason", "code"),
    [
        ("waits", job("12_2", "PENDING"), "running", "3 tasks: 1 queued, 1 done, 1 failed", None),
        ("runs", job("12_2", "RUNNING"), "running", "3 tasks: 1 running, 1 done, 1 failed", None),
        ("ended", job("12_2", "COMPLETED"), "failed", "3 tasks: 2 done, 1 failed", 7),
        ("ended", None, "failed", "3 tasks: 2 done, 1 failed", 7),
    ],
)
def test_the_state_of_an_array_is_that_of_all_its_tasks(
    tmp_path: Path, last: str, slurm: object, state: str, reason: str, code: int | None
) -> None:
    run = made(tmp_path)
    if last != "waits":
        run.start("12.0", 60, array=["12", 2]).alive("12.0", 1)
    if last == "ended":
        run.end("12.0", 10, 0, "done")
    found = state_of(run, Slurm(slurm) if slurm else Slurm())  # type: ignore[arg-type]
    assert (found.state, found.reason, found.code) == (state, reason, code)


def test_status_and_logs_name_the_tasks(tmp_path: Path) -> None:
    run = made(tmp_path).put("13.0", "driver.log", "zero\n").put("14.0", "driver.log", "one\n")
    environ = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    shown = subprocess.run(
        [SLURMKIT, "status", run.path], env=environ, check=True, capture_output=True, text=True
    ).stdout
    assert "tasks          2" in shown
    assert "  [1]  14.0" in shown
    lines = list(Reader(run.path, Queue(None), attempt="12_0").lines(False, lambda: None))
    assert [line.text for line in lines if line.source == "driver"] == ["zero"]
    first = next(Reader(run.path, Queue(None)).lines(False, lambda: None))
    assert first.text == "an array of 2 tasks so far: --attempt shows another (12_0, 12_1)"
