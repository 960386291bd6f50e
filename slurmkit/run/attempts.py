"""What the files of a run directory say of its attempts and its progress, written to the end or not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.run.directory import attempt_folders, next_job, read_json, recorded

# Seconds without a heartbeat, one every 2 s, after which nobody is there: files may show a minute late over a network.
SILENCE = 120.0
# Steps whose mean tells the time left.
_RECENT = 20


class Attempt(NamedTuple):
    """One attempt that has begun, from its folder. Times are seconds since the epoch."""

    name: str
    """The folder's: JOBID.RESTART, or local-N."""
    job_id: str | None
    nodes: str
    started: float | None
    ended: float | None
    code: int | None
    reason: str
    bad_nodes: tuple[str, ...]
    goes_on: bool
    cancelled: bool
    max_attempts: int | None
    is_follow_up: bool
    follow_up: str | None
    """The job that was queued to go on after it."""
    folder: Path
    array: str | None = None
    """The array's job id, if the attempt is a task of one."""
    task: int | None = None
    """The task's index."""

    @property
    def has_ended(self) -> bool:
        """Whether its exit code is known."""
        return self.code is not None

    @property
    def has_record(self) -> bool:
        """Whether it wrote its end down itself; until then its command may have ended, and the job not."""
        return self.has_ended and (self.folder / "end.json").exists()


class RunFiles:
    """What the files of a run directory say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = _header(path / "job.sbatch")
        self.attempts: list[Attempt] = []
        self.waiting: str | None = None
        """The last job of the run, where it has not begun."""
        folders: dict[str, list[Path]] = {}
        for folder in attempt_folders(path):
            folders.setdefault(folder.name.partition(".")[0], []).append(folder)
        starts = {folder: read_json(folder / "start.json") or {} for each in folders.values() for folder in each}
        follow_ups = {
            str(start["previous"]): folder.name.partition(".")[0]
            for folder, start in starts.items()
            if start.get("previous")
        }
        follow_ups |= {folder.name.partition(".")[0]: job for folder in starts if (job := next_job(folder))}
        self.order = [str(each.get("job_id") or each.get("local")) for each in recorded(path)]
        seen: set[str] = set()
        for first in [*self.order, *sorted(folders, key=_number)]:
            key: str | None = first
            while key is not None and key not in seen:
                seen.add(key)
                made = [_attempt(each, starts[each]) for each in sorted(folders.get(key, []), key=restart_of)]
                self.attempts += made
                self.waiting = None if made else key
                key = follow_ups.get(key)
                if made and made[-1].has_record and not made[-1].goes_on and key is not None and key not in self.order:
                    seen.add(key)  # a follow-up that finds nothing left to do
                    key = None

    def in_question(self) -> list[str]:
        """The jobs whose state in Slurm tells more than the files do."""
        if "array" in self.header:
            return [job for job in self.order[-1:] if job.isdigit()]
        jobs = [self.waiting] if self.waiting and self.waiting.isdigit() else []
        last = self.attempts[-1] if self.attempts else None
        if last is not None and last.job_id is not None and (not last.has_record or self._may_be_requeued(last)):
            jobs.append(last.job_id)
        return jobs

    def _may_be_requeued(self, attempt: Attempt) -> bool:
        failed = attempt.code not in (0, 1, 2) and not attempt.cancelled
        return failed and not attempt.goes_on and "no-requeue" not in self.header


def _header(script: Path) -> dict[str, str]:
    """The options of a rendered script."""
    try:
        with script.open("rb") as file:
            head = file.read(8192).decode(errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.MULTILINE))


def _number(key: str) -> int:
    return int(key.rpartition("-")[2])


def restart_of(folder: Path) -> int:
    """How often Slurm had queued the job again before this attempt."""
    return int(folder.name.rpartition(".")[2]) if "." in folder.name else 0


def _attempt(folder: Path, start: Mapping[str, Any]) -> Attempt:
    end = read_json(folder / "end.json") or {}
    started = number(start.get("started"))
    ended = number(end.get("ended"))
    code = end.get("code") if isinstance(end.get("code"), int) else None
    if started is not None and ended is not None and ended < started - 1:
        end, code, ended = {}, None, None  # it was cancelled while it waited, and started nevertheless
    reason = str(end.get("reason") or "")
    if code is None and (written := text_of(folder / "bringup/exit_code")).isdigit():
        # The command has ended; this slurmkit's job writes end.json a moment later, an older one's never.
        code, ended = int(written), changed(folder / "bringup/exit_code")
    name = folder.name.partition(".")[0]
    limit = start.get("max_attempts")
    return Attempt(
        folder.name,
        name if name.isdigit() else None,
        str(start.get("nodes") or ""),
        started,
        ended,
        code,
        plain(reason),
        tuple(map(str, end.get("bad_nodes") or ())),
        bool(end.get("goes_on")),
        bool(end.get("cancelled")),
        limit if isinstance(limit, int) else None,
        bool(start.get("previous")),
        next_job(folder),
        folder,
        *_task(start.get("array")),
    )


def _task(value: Any) -> tuple[str, int] | tuple[None, None]:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
        return str(value[0]), value[1]
    return None, None


def reports(attempt: Attempt) -> str:
    """What failed nodes said, where nothing else says why."""
    return "; ".join(
        f"node {path.name.removeprefix('failed.')}: {plain(text_of(path))}"
        for path in sorted((attempt.folder / "bringup").glob("failed.*"))
    )


def heartbeats(attempt: Attempt) -> list[Path]:
    """The files that its nodes write every 2 s."""
    return list((attempt.folder / "bringup").glob("alive.*"))


def last_written(attempt: Attempt) -> float | None:
    """When the attempt last gave a sign of life."""
    paths = heartbeats(attempt) or [attempt.folder / name for name in ("start.json", "driver.log", "bringup")]
    return max(filter(None, map(changed, paths)), default=None)


def silence(attempt: Attempt, now: float) -> float:
    """Seconds since then."""
    return now - (last_written(attempt) or 0.0)


def progress(path: Path) -> dict[str, Any]:
    """The newest figures of metrics.jsonl, read from its end."""
    rows: list[dict[str, Any]] = []  # newest first
    accuracy = None
    for size in (1 << 16, 1 << 18):
        lines, whole = _last_lines(path, size)
        rows = [row for line in lines[:_RECENT] if (row := _row(line))]
        # Further back only a validation is of interest.
        validations = (_row(line) for line in lines if b'"val:accuracy"' in line)
        accuracy = next((row["val:accuracy"] for row in validations if row), None)
        if whole or accuracy is not None:
            break
    latest: dict[str, Any] = {}
    for row in reversed(rows):
        latest |= row
    step, last_step = latest.get("step"), latest.get("last_step")
    times = [row["time:step"] for row in rows if "time:step" in row]
    left = max(0, last_step - step) * sum(times) / len(times) if times and step is not None and last_step else None
    reward = latest.get("train:reward_mean")
    return {"step": step, "last_step": last_step, "reward": reward, "accuracy": accuracy, "left": left}


def _last_lines(path: Path, size: int) -> tuple[list[bytes], bool]:
    """The whole lines among the last `size` bytes, newest first, and whether those are all."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            return file.read().split(b"\n")[(length > size) : -1][::-1], length <= size
    except OSError:
        return [], True


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def checkpoint(path: Path) -> str | None:
    """The newest that is complete."""
    try:
        steps = [int(name[5:]) for name in os.listdir(path) if name.startswith("step_") and name[5:].isdigit()]
    except OSError:
        return None
    names = (f"step_{step}" for step in sorted(steps, reverse=True))
    return next((name for name in names if (path / name / "manifest.json").exists()), None)


def number(value: Any) -> float | None:
    """A number in a record, None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def text_of(path: Path) -> str:
    """A small file's text, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def changed(path: Path) -> float | None:
    """When it was written last."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def plain(text: str) -> str:
    """One line without what could move a terminal's cursor."""
    return "".join(each if each.isprintable() else " " for each in " ".join(text.split()))


def count_nodes(nodes: str) -> int:
    """How many `node[1-3,7],x` are."""
    total = 0
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        groups = re.findall(r"\[([^\]]*)\]", part)
        spans = [[item.split("-") for item in group.split(",")] for group in groups]
        total += prod(sum(int(span[-1]) - int(span[0]) + 1 for span in group) for group in spans)
    return total


def clock(text: str | None) -> float | None:
    """Slurm's text as seconds since the epoch."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except ValueError:
        return None
