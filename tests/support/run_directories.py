"""Run directories made by hand, as jobs leave them, and Slurm's word on them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurmkit.slurm.client import JobState, JobUsage


class Made:
    """A run directory, grown attempt by attempt. Ages are seconds before `now`."""

    def __init__(self, path: Path, *options: str) -> None:
        self.path, self.now = path, float(int(time.time()))
        lines = [f"#SBATCH --{option}" for option in (f"job-name={path.name}", "nodes=2", "time=1:00:00", *options)]
        self._write(path / "job.sbatch", "\n".join(["#!/bin/bash", *lines, ""]))
        self.record()

    def record(self, *job_ids: str, **local: str) -> Made:
        attempts = [{"job_id": job_id} for job_id in job_ids] + [{"local": name} for name in local.values()]
        self._write(self.path / "run.json", json.dumps({"identity": {}, "attempts": attempts}))
        return self

    def start(self, name: str, age: float, **facts: Any) -> Made:
        job_id, _, restart = name.partition(".")
        start = {"nodes": "node[1-2]", "started": self.now - age, "previous": None, "max_attempts": None, **facts}
        start |= {"job_id": job_id, "restart": int(restart)} if restart else {"local": name}
        return self.put(name, "start.json", json.dumps(start), age)

    def end(self, name: str, age: float, code: int, reason: str = "", **facts: Any) -> Made:
        end = {"code": code, "reason": reason, "ended": self.now - age, "bad_nodes": [], "goes_on": False} | facts
        return self.put(name, "end.json", json.dumps({"cancelled": False} | end), age)

    def put(self, name: str, file: str, text: str = "", age: float = 0.0) -> Made:
        self._write(self.path / "attempts" / name / file, text, age)
        return self

    def alive(self, name: str, age: float) -> Made:
        for number in (0, 1):
            self.put(name, f"bringup/alive.{number}", "7", age)
        return self.put(name, "driver.log", "", age)

    def steps(self, *rows: dict[str, Any], last_step: int = 10) -> Made:
        lines = [json.dumps({"step": step, "last_step": last_step, **row}) for step, row in enumerate(rows, 1)]
        self._write(self.path / "metrics.jsonl", "\n".join([*lines, '{"step": 99, "cut sho']))
        return self

    def _write(self, path: Path, text: str, age: float = 0.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for each in (path, path.parent):
            os.utime(each, (self.now - age, self.now - age))


class Slurm:
    """Answers like a client, and counts how often it is asked."""

    def __init__(self, *jobs: JobState, usage: Sequence[JobUsage] = ()) -> None:
        self._jobs, self._usage, self.asked = jobs, tuple(usage), 0

    def jobs(self, job_ids: Sequence[str] = (), *, user: str = "") -> tuple[JobState, ...]:
        self.asked += 1
        return tuple(job for job in self._jobs if job.job_id.partition("_")[0] in job_ids)

    def usage(self, job_ids: Sequence[str]) -> tuple[JobUsage, ...]:
        return tuple(each for each in self._usage if each.job_id in job_ids)


def job(job_id: str, state: str, reason: str = "", *, name: str = "run", **facts: Any) -> JobState:
    known = {"exit_code": 0, "signal": 0, "nodes": "", "time_limit": 60, "restarts": 0, "start": None, **facts}
    return JobState(job_id=job_id, state=state, reason=reason, name=name, **known)
