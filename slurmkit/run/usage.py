"""What a run has used up: of each attempt and in sum, from accounting where there is some, else from its files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.errors import INTERRUPTED, Failure
from slurmkit.job.values import gpus_in_gres, gpus_of
from slurmkit.run.attempts import (
    Attempt,
    RunFiles,
    changed,
    clock,
    count_nodes,
    last_written,
    restart_of,
)
from slurmkit.run.directory import jobs_of
from slurmkit.run.state import Queue, read_states
from slurmkit.slurm.client import JobUsage, SlurmClient

# `step 3/250  reward 0.250  …  2.31 s`, as the trainer tells a finished step in the driver's log.
_STEP = re.compile(rb"^step ([1-9]\d*)/\d+ .*?([\d.]+) s$")


class AttemptUsage(NamedTuple):
    """One attempt. Seconds; None is not known."""

    name: str
    source: str
    """`sacct` or `files`."""
    waited: float | None
    """In the queue, since nothing but other jobs kept it from starting."""
    elapsed: float
    nodes: int
    gpus: int
    node_hours: float
    gpu_hours: float
    cpu_efficiency: float | None
    """CPU time taken of that allocated."""
    lost: float | None
    """After its last finished step, and in steps that were made again."""


class Usage(NamedTuple):
    """A whole run."""

    name: str
    attempts: tuple[AttemptUsage, ...]
    waited: float
    elapsed: float
    node_hours: float
    gpu_hours: float
    lost: float | None
    in_steps: float | None
    """Seconds of all steps that count."""
    efficiency: float | None
    """Share of the elapsed time in those steps."""

    def as_json(self) -> dict[str, Any]:
        """Plain data under stable keys."""
        return self._asdict() | {"attempts": [each._asdict() for each in self.attempts]}


def usage_of(path: Path, client: SlurmClient | None) -> tuple[Usage, str | None]:
    """What the run has used up until now, and why accounting could not be asked, where it could not."""
    files, problem = RunFiles(path), None
    booked: dict[str, list[JobUsage]] = {}
    try:
        for row in client.usage(sorted(jobs_of(path))) if client is not None else ():
            if row.seconds and row.name == files.header.get("job-name", row.name):
                booked.setdefault(row.job_id, []).append(row)
    except Failure as error:
        problem = str(error)
    (state,) = read_states([path], Queue(client))
    attempts = tuple(_attempts(files, booked, state.state in ("starting", "running")))
    in_steps = _in_steps(path / "metrics.jsonl")
    elapsed = sum(each.elapsed for each in attempts)
    known = [each.lost for each in attempts if each.lost is not None]
    return Usage(
        path.name,
        attempts,
        sum(each.waited or 0.0 for each in attempts),
        elapsed,
        sum(each.node_hours for each in attempts),
        sum(each.gpu_hours for each in attempts),
        sum(known) if known else None,
        in_steps,
        in_steps / elapsed if in_steps is not None and elapsed else None,
    ), problem


def _attempts(files: RunFiles, booked: Mapping[str, list[JobUsage]], is_active: bool) -> Iterator[AttemptUsage]:
    steps = [_steps(attempt) for attempt in files.attempts]
    trains = (files.path / "metrics.jsonl").exists()
    for index, attempt in enumerate(files.attempts):
        restart, rows = restart_of(attempt.folder), booked.get(attempt.job_id or "", [])
        goes_on = is_active and index == len(files.attempts) - 1
        used = _booked(attempt.name, rows[restart]) if restart < len(rows) else _unbooked(files, index, goes_on)
        if used is not None:
            # Steps after the checkpoint that the next attempt went on from.
            later = set().union(*steps[index + 1 :])
            again = sum(seconds for step, seconds in steps[index].items() if step in later)
            tail = _tail(attempt, bool(steps[index]), used.elapsed) if trains and not goes_on else None
            yield used._replace(lost=None if tail is None else min(used.elapsed, tail + again))
    # Follow-ups that found nothing left to do.
    names = {attempt.name for attempt in files.attempts}
    for job_id, rows in booked.items():
        for restart, row in enumerate(rows):
            if f"{job_id}.{restart}" not in names:
                yield _booked(f"{job_id}.{restart}", row)


def _booked(name: str, row: JobUsage) -> AttemptUsage:
    eligible, start = clock(row.eligible), clock(row.start)
    return _used(
        name,
        "sacct",
        max(0.0, start - eligible) if start is not None and eligible is not None else None,
        float(row.seconds),
        row.nodes,
        row.gpus,
        row.cpu_seconds_used / row.cpu_seconds if row.cpu_seconds_used is not None and row.cpu_seconds else None,
    )


def _unbooked(files: RunFiles, index: int, is_active: bool) -> AttemptUsage | None:
    """None of an attempt that never began."""
    attempt = files.attempts[index]
    began = attempt.started
    if began is None:
        return None
    ended = time.time() if is_active else attempt.ended or last_written(attempt) or began
    # A follow-up waits for the end of the one before it.
    before = files.attempts[index - 1].ended if index and attempt.is_follow_up else None
    nodes = count_nodes(attempt.nodes) or int(files.header.get("nodes", 1))
    gpus = 0 if attempt.job_id is None else _gpus(files.header, nodes)
    waited = max(0.0, began - before) if before is not None else None
    return _used(attempt.name, "files", waited, max(0.0, ended - began), nodes, gpus, None)


def _used(
    name: str, source: str, waited: float | None, elapsed: float, nodes: int, gpus: int, cpus: float | None
) -> AttemptUsage:
    hours = elapsed / 3600
    return AttemptUsage(name, source, waited, elapsed, nodes, gpus, nodes * hours, gpus * hours, cpus, None)


def _gpus(header: Mapping[str, str], nodes: int) -> int:
    """GPUs of the whole job, as its script asks for them."""
    try:
        if "gpus" in header:
            return gpus_of(header["gpus"])
        if "gpus-per-node" in header:
            return gpus_of(header["gpus-per-node"]) * nodes
        return gpus_in_gres(header.get("gres", "")) * nodes
    except ValueError:
        return 0


def _tail(attempt: Attempt, has_steps: bool, elapsed: float) -> float | None:
    """Seconds after the last finished step."""
    if attempt.code in (0, INTERRUPTED):
        return 0.0
    if attempt.started is None or not has_steps:
        return None if attempt.started is None else elapsed
    # The driver's last word is its last step, or soon afterwards why it ended.
    spoken = changed(attempt.folder / "driver.log") or attempt.started
    return max(0.0, attempt.started + elapsed - spoken)


def _steps(attempt: Attempt) -> dict[int, float]:
    """The seconds of each step that the attempt finished."""
    try:
        with (attempt.folder / "driver.log").open("rb") as log:
            return {int(found[1]): float(found[2]) for line in log if (found := _STEP.match(line))}
    except (OSError, ValueError):
        return {}


def _in_steps(metrics: Path) -> float | None:
    """Seconds of the steps that count: what was made again stands there once."""
    try:
        with metrics.open("rb") as file:
            rows = [json.loads(line) for line in file if line.endswith(b"}\n")]
    except (OSError, ValueError):
        return None
    times = [row["time:step"] for row in rows if "time:step" in row]
    return sum(times) if times else None
