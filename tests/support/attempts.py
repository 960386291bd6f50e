"""Folders of attempts as their nodes leave them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from slurmkit.keeper.meeting import Meeting


@pytest.fixture
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Meeting:
    """That of attempt 7.0, which has begun its job step."""
    for name in list(os.environ):
        if name.startswith(("SK_", "SLURM")):
            monkeypatch.delenv(name)
    made = attempt(tmp_path, monkeypatch, "7")
    made.publish("srun", "1")
    return made


def attempt(run: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> Meeting:
    folder = run / f"attempts/{job}.0"
    (folder / "bringup").mkdir(parents=True)
    for name, value in {
        "SK_ATTEMPT": f"{job}.0",
        "SK_ATTEMPT_DIR": str(folder),
        "SK_MEET": str(folder / "bringup"),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }.items():
        monkeypatch.setenv(name, value)
    return Meeting()


def followed(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, start: dict[str, Any], end: dict[str, Any] | None, job: str = "8"
) -> Meeting:
    """The attempt that comes after `meeting`'s."""
    first = {"job_id": "7", "attempt": 4, "run_started": int(time.time()), "failures": 0, "step": 20}
    meeting.record("start.json", first | start)
    if end is not None:
        meeting.record("end.json", {"code": 75, "goes_on": True} | end)
    monkeypatch.setenv("SK_PREVIOUS", "7")
    return attempt(Path(meeting.run), monkeypatch, job)


def checkpoint(meeting: Meeting, step: int) -> None:
    Path(meeting.run, f"step_{step}").mkdir()
    Path(meeting.run, f"step_{step}/manifest.json").touch()
