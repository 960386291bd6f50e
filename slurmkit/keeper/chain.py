"""Where an attempt stands among those of its run, and whether another may follow."""

import json
import os
import re
import sys
import time
from typing import Any, Dict, NamedTuple, Optional

from slurmkit.keeper.meeting import INTERRUPTED, NODES_FAILED, Meeting, tell, text_of

# Failed attempts in a row, without a newer checkpoint, after which training stops.
FAILURES = 3


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
        self.step = newest_step(self.run)
        previous = os.environ.get("SK_PREVIOUS", "")
        start = self._record(previous, "start.json")
        if limits.until_done and start.get("job_id") == previous:
            end = self._record(previous, "end.json")
            self.previous = previous
            self.is_over = end.get("goes_on") is False
            self.number = start["attempt"] + 1
            self.began = start["run_started"]
            self.code = end.get("code", NODES_FAILED)
            has_failed = self.code != INTERRUPTED and self.step <= start["step"]
            self.failures = start["failures"] + 1 if has_failed else 0

    def _record(self, job: str, name: str) -> Dict[str, Any]:
        text = text_of(os.path.join(self.run, "attempts", job + ".0", name)) if job else ""
        try:
            return dict(json.loads(text))
        except ValueError:
            return {}

    def end(self, attempts: int, failures: int, now: float) -> str:
        """Why no attempt follows after so many, "" where one may."""
        limits, why = self.limits, []
        if limits.max_attempts is not None and attempts >= limits.max_attempts:
            why.append(f"no attempt is left of {limits.max_attempts} (max_attempts)")
        if limits.max_hours is not None and now - self.began >= limits.max_hours * 3600:
            why.append("its hours are over (max_hours)")
        if limits.trains and failures >= FAILURES:
            why.append(f"{failures} attempts in a row failed without a newer checkpoint than step_{self.step}")
        return "; ".join(why)

    def end_after(self, code: int, now: float) -> str:
        """Why no attempt follows this one, which ended with `code`."""
        has_failed = code != INTERRUPTED and newest_step(self.run) <= self.step
        return self.end(self.number, self.failures + 1 if has_failed else 0, now)


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
    os.makedirs(meeting.meet, exist_ok=True)
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
    meeting.record("start.json", start)
    why = chain.end(chain.number - 1, chain.failures, now) if chain.previous else ""  # it may have waited for too long
    if why:
        tell(why, sys.stderr)
        end = {"code": chain.code, "reason": why, "ended": int(now)}
        meeting.record("end.json", dict(end, bad_nodes=[], goes_on=False, cancelled=False))
        print(chain.code)
