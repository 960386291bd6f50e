"""The state of a job array: of all its tasks together."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from slurmkit.job.values import jobs_in
from slurmkit.run.attempts import SILENCE, Attempt, RunFiles, silence
from slurmkit.slurm.client import JobState


class ArrayState(NamedTuple):
    """State, reason and exit code of an array, and when its last task ended, in seconds since the epoch."""

    state: str
    reason: str
    code: int | None
    ended: float | None


def tasks_of(files: RunFiles) -> list[Attempt]:
    """Return the tasks of the array that was submitted last, by index."""
    last = files.order[-1] if files.order else None
    tasks = [each for each in files.attempts if each.array in (last, None)]
    return sorted(tasks, key=lambda each: -1 if each.task is None else each.task)


def array_state(files: RunFiles, job: JobState | None, is_asked: bool, now: float) -> ArrayState:
    """Return the state of all tasks together. `job` is Slurm's state of the array, None if Slurm has forgotten it."""
    tasks = tasks_of(files)
    total = max(jobs_in(files.header["array"]), len(tasks))
    is_active = not job.is_final if job is not None else not is_asked
    found = Counter(_state_of(each, is_active, now) for each in tasks)
    found["queued" if is_active else "never started"] += total - len(tasks)
    words = ", ".join(f"{found[state]} {state}" for state in _ORDER if found[state])
    reason = f"{total} tasks: {words}"
    if found["running"] or (is_active and found["queued"]):
        return ArrayState("running" if tasks else "queued", reason, None, None)
    state = next((each for each in ("failed", "lost", "never started", "cancelled") if found[each]), "done")
    code = next((each.code for each in tasks if each.code), 0 if state == "done" else 1)
    ended = max((each.ended for each in tasks if each.ended is not None), default=None)
    return ArrayState(state, reason, code, ended)


_ORDER = ("running", "queued", "done", "failed", "cancelled", "lost", "never started")


def _state_of(task: Attempt, is_active: bool, now: float) -> str:
    if task.has_ended:
        return "cancelled" if task.cancelled else "failed" if task.code else "done"
    return "running" if is_active and silence(task, now) <= SILENCE else "lost"
