"""End a run: its job and whatever is queued behind it, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from slurmkit.errors import Failure, UserError
from slurmkit.run.directory import read_json, write_json
from slurmkit.run.state import Queue, RunState, read_states, supervisor
from slurmkit.run.verify import run_dir_in
from slurmkit.slurm.client import SlurmClient

# Seconds until a job that was told to end is left to it, and between two looks.
_DEADLINE = 30.0
_POLL = 0.5


class Cancelled(NamedTuple):
    """What became of a run. Example: Cancelled(RunState(…), ("14", "12"))."""

    state: RunState
    jobs: tuple[str, ...]
    """Those that were cancelled; none where the run had ended before."""


def cancel(path: Path, client: SlurmClient | None) -> Cancelled:
    """Cancel the run's jobs, or ask the process of a local run to leave. A run that has ended is left as it is.

    Failure where it cannot be reached from here, UserError where a job of that id is not this run's.
    """
    queue = Queue(client)
    state = _state(path, queue)
    told: list[str] = []
    deadline = time.monotonic() + _DEADLINE
    while not state.is_final and time.monotonic() < deadline:
        if state.job_id is None:
            _end_local(state, told)
        elif client is None:
            raise Failure(f"{path.name} is job {state.job_id}, and there is no Slurm here: cancel it on its cluster")
        else:
            # The follow-up first, which the end of the other would let start.
            for job_id in filter(None, (state.next, state.job_id)):
                if job_id not in told:
                    _end_job(client, job_id, state)
                    told.append(job_id)
        time.sleep(_POLL)
        state = _state(path, queue)
    return Cancelled(state, tuple(told))


def _state(path: Path, queue: Queue) -> RunState:
    state = read_states([path], queue)[0]
    if queue.problem is not None:
        raise Failure(queue.problem)
    return state


def _end_job(client: SlurmClient, job_id: str, state: RunState) -> None:
    owner = run_dir_in(client.script_of(job_id))
    if owner is None or owner.resolve() != state.path.resolve():
        raise UserError(f"job {job_id} is not {state.name}'s: its run directory is {owner or 'unknown'}")
    client.cancel(job_id)
    job = client.job(job_id)
    folder = state.path / "attempts" / f"{job_id}.{(job.restarts if job is not None else 0) or 0}"
    if state.state in ("queued", "going on") and not folder.exists():
        # Nobody else will write it. Should it have begun at this very moment, its own record is the later one.
        folder.mkdir(parents=True)
        record = {"code": 143, "reason": "cancelled before it began", "ended": time.time(), "bad_nodes": []}
        write_json(folder / "end.json", {**record, "goes_on": False, "cancelled": True})


def _end_local(state: RunState, told: list[str]) -> None:
    start = read_json(state.attempts[-1].folder / "start.json") or {} if state.attempts else {}
    pid = supervisor(start)
    if pid is None:
        raise Failure(f"{state.name} runs on {start.get('nodes') or 'another machine'}: cancel it there")
    if not told:
        os.kill(pid, signal.SIGTERM)
        told.append(f"process {pid}")
