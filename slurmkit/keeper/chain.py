"""Where an attempt stands among those of its run, and whether another may follow."""

import json
import os
import re
import sys
import time
from contextlib import suppress
from typing import Any, Dict, NamedTuple, Optional

from slurmkit.keeper.meeting import INTERRUPTED, NODES_FAILED, Meeting, ask, tell, text_of, write

# Failed attempts in a row, without a newer checkpoint, after which training stops.
FAILURES = 3
# What Slurm's accounting says of an attempt that left no record of its end.
_KILLED = {
    "TIMEOUT": "killed at its time limit",
    "NODE_FAIL": "a node failed",
    "PREEMPTED": "preempted",
    "OUT_OF_MEMORY": "out of memory",
    "CANCELLED": "cancelled",
    "FAILED": "the batch script was killed",
}


class Limits(NamedTuple):
    """Whether and how long a run goes on by itself."""

    until_done: bool
    max_attempts: Optional[int]
    max_hours: Optional[float]
    trains: bool


class Chain:
    """Where this attempt stands among those of its run."""

    def __init__(self, meeting: Meeting, limits: Limits, now: float) -> None:
        self.limits = limits
        self.run = meeting.run
        self.restart = int(meeting.attempt.rpartition(".")[2])
        self.number = self.restart + 1
        self.began, self.failures = now, 0
        self.previous: Optional[str] = None
        self.code = NODES_FAILED  # the previous attempt's; one that left no record was killed hard
        self.is_over = False
        self.never_started = False
        """True if the previous attempt ended before its command started, and no node was lost."""
        self.step = newest_step(self.run)
        # In the first node's environment only; the second reads it from the first one's record.
        previous = os.environ.get("SK_PREVIOUS") or self._record(meeting.attempt, "start.json").get("previous") or ""
        start = self._record(previous, "start.json")
        if limits.until_done and start.get("job_id") == previous:
            end = self._record(previous, "end.json")
            self.previous = previous
            self.is_over = end.get("goes_on") is False
            self.never_started = end.get("never_started") is True
            self.number = start["attempt"] + 1
            self.began = start["run_started"]
            self.code = end.get("code", NODES_FAILED)
            has_failed = self.code != INTERRUPTED and self.step <= start["step"]
            self.failures = start["failures"] + 1 if has_failed else 0

    def _record(self, job: str, name: str) -> Dict[str, Any]:
        folder = job if "." in job else job + ".0"
        text = text_of(os.path.join(self.run, "attempts", folder, name)) if job else ""
        try:
            return dict(json.loads(text))
        except ValueError:
            return {}

    def end(self, attempts: int, failures: int, now: float) -> str:
        """Why no attempt follows after so many, "" where one may."""
        limits, why = self.limits, []
        if limits.max_attempts is not None and attempts >= limits.max_attempts:
            why.append(f"attempt {attempts} of {limits.max_attempts} was the last (max_attempts)")
        if limits.max_hours is not None and now - self.began >= limits.max_hours * 3600:
            why.append(f"the run began more than {limits.max_hours:g} h ago (max_hours)")
        if limits.trains and failures >= FAILURES:
            why.append(f"{failures} attempts in a row failed without a newer checkpoint than step_{self.step}")
        return "; ".join(why)

    def end_after(self, code: int, now: float, never_started: bool = False) -> str:
        """Return why no attempt follows this one, which ended with `code`, "" if one may."""
        has_failed = code != INTERRUPTED and newest_step(self.run) <= self.step
        why = [self.end(self.number, self.failures + 1 if has_failed else 0, now)]
        if never_started and self.never_started:
            why.append("2 attempts in a row ended before the command started")
        return "; ".join(filter(None, why))

    def complete_record(self) -> None:
        """Record how the previous attempt ended, from Slurm's accounting, if it was killed before it could."""
        folder = os.path.join(self.run, "attempts", f"{self.previous}.0")
        path = os.path.join(folder, "end.json")
        if self.previous is None or os.path.exists(path):
            return
        answer = ask("sacct", "-X", "-n", "-P", "-j", self.previous, "-o", "State,ExitCode,End", timeout=10) or ""
        words, exit_code, ended = [*answer.splitlines()[-1:], "||"][0].split("|")[:3]
        state = words.partition(" ")[0]  # CANCELLED by 0
        if state not in _KILLED:
            return
        code, _, number = exit_code.partition(":")
        end = {
            "code": 128 + int(number) if number not in ("", "0") else int(code or 0) or NODES_FAILED,
            "reason": f"{_KILLED[state]}, before it recorded its end (Slurm: {state})",
            "ended": int(time.mktime(time.strptime(ended, "%Y-%m-%dT%H:%M:%S"))) if ended[:1] == "2" else None,
        }
        with suppress(OSError):
            write(path, json.dumps(dict(end, bad_nodes=[], goes_on=True, cancelled=state == "CANCELLED")))


def newest_step(run: str) -> int:
    """Of the run's complete checkpoints, 0 where there is none."""
    steps = [0]
    for name in os.listdir(run):
        if re.match(r"step_\d+$", name) and os.path.exists(os.path.join(run, name, "manifest.json")):
            steps.append(int(name[5:]))
    return max(steps)


def begin(meeting: Meeting, limits: Limits) -> None:
    """Record that the attempt has begun. Prints the exit code where there is nothing to do."""
    now = time.time()
    chain = Chain(meeting, limits, now)
    if chain.is_over:
        tell(f"job {chain.previous} ended the run: there is nothing to go on with", sys.stderr)
        print(0)
        return
    is_made = meeting.make()
    chain.complete_record()
    start = {
        "job_id": os.environ["SLURM_JOB_ID"],
        "restart": chain.restart,
        "attempt": chain.number,
        "nodes": os.environ["SLURM_JOB_NODELIST"],
        "started": int(now),
        "previous": chain.previous,
        "max_attempts": limits.max_attempts if limits.until_done else None,
        "run_started": int(chain.began),
        "failures": chain.failures,
        "step": chain.step,
    }
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        start["array"] = [os.environ["SLURM_ARRAY_JOB_ID"], int(os.environ["SLURM_ARRAY_TASK_ID"])]
    if not (is_made and meeting.record("start.json", start)):
        tell(meeting.full, sys.stderr)
        print(NODES_FAILED)
        return
    meeting.reserve()
    why = chain.end(chain.number - 1, chain.failures, now) if chain.previous else ""  # it may have waited for too long
    if why:
        tell(why, sys.stderr)
        end = {"code": chain.code, "reason": why, "ended": int(now)}
        meeting.record("end.json", dict(end, bad_nodes=[], goes_on=False, cancelled=False))
        print(chain.code)
