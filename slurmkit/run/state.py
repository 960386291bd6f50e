"""How a run stands: from its run directory alone, and where there is a Slurm, from its word on the jobs that count."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.errors import INTERRUPTED, Failure
from slurmkit.run.arrays import array_state
from slurmkit.run.attempts import (
    SILENCE,
    Attempt,
    RunFiles,
    checkpoint,
    clock,
    count_nodes,
    heartbeats,
    last_written,
    number,
    progress,
    reports,
    restart_of,
    silence,
)
from slurmkit.run.directory import read_json
from slurmkit.slurm.client import JobState, SlurmClient
from slurmkit.slurm.words import how_it_ended, why_it_waits

# The states that a run does not leave by itself.
FINAL = frozenset({"done", "failed", "cancelled", "interrupted", "lost", "never started"})
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})


class RunState(NamedTuple):
    """A run. Times are seconds, those of the clock since the epoch; what is not known is None or ""."""

    name: str
    path: Path
    state: str
    """queued, starting, running, going on (between two attempts), or one of FINAL."""
    reason: str
    """Why, in words."""
    job_id: str | None
    """The job that the state is of."""
    next: str | None
    """A follow-up in the queue behind it."""
    nodes: str
    started: float | None
    ended: float | None
    elapsed: float | None
    """Of the attempt."""
    limit: float | None
    step: int | None
    last_step: int | None
    reward: float | None
    accuracy: float | None
    left: float | None
    """Until the last step."""
    checkpoint: str | None
    """The newest, such as step_50."""
    code: int | None
    """The run's exit code, once it is final."""
    attempts: tuple[Attempt, ...]
    """Those of an array are its tasks."""
    max_attempts: int | None

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in FINAL

    @property
    def is_certain(self) -> bool:
        """Whether the last attempt's own record says that it was the last."""
        return bool(self.attempts) and self.attempts[-1].has_record and not self.attempts[-1].goes_on

    def as_json(self) -> dict[str, Any]:
        """Plain data under stable keys."""
        attempts = [each._asdict() | {"folder": str(each.folder)} for each in self.attempts]
        return self._asdict() | {"path": str(self.path), "attempts": attempts}


class Queue:
    """Slurm's word on many jobs at once: one squeue, and what that has forgotten once from accounting."""

    def __init__(self, client: SlurmClient | None) -> None:
        self._client = client
        self._settled: dict[str, JobState | None] = {}
        self.problem: str | None = None
        """Why Slurm could not be asked the last time."""

    def ask(self, job_ids: Iterable[str]) -> Mapping[str, JobState | None] | None:
        """None of a job is that Slurm has forgotten it; None of all that Slurm was not asked."""
        wanted = sorted(set(job_ids) - set(self._settled), key=int)
        self.problem = None
        if self._client is None:
            return None
        try:
            found = self._client.jobs(wanted) if wanted else ()
        except Failure as error:
            self.problem = str(error)
            return None
        answer: dict[str, JobState | None] = dict.fromkeys(wanted)
        for job in found:  # of an array: the task that has not ended
            key = re.split(r"[_+]", job.job_id)[0]
            if answer.get(key) is None or not job.is_final:
                answer[key] = job
        # What only accounting remembers, or nobody, does not change any more.
        self._settled |= {key: job for key, job in answer.items() if job is None or job.restarts is None}
        return answer | self._settled


def read_states(paths: Sequence[Path], queue: Queue, now: float | None = None) -> list[RunState]:
    """The states of all these runs, with one question to Slurm. Never fails for what is missing or broken in one."""
    found = [RunFiles(path) for path in paths]
    jobs = queue.ask(job_id for each in found for job_id in each.in_question())
    return [_judge(each, jobs, time.time() if now is None else now) for each in found]


def followed(path: Path, queue: Queue) -> Iterator[tuple[RunState, bool]]:
    """How a run stands each time that somebody asks, and whether it has ended for good.

    Without a record, files of one attempt and Slurm's word on the next may be seen out of order: an end is believed
    when it is seen twice, and until then the state before it stands.
    """
    shown: RunState | None = None
    finals = 0
    while True:
        (state,) = read_states([path], queue)
        finals = (finals + 1 if not state.is_certain else 2) if state.is_final else 0
        if finals != 1 or shown is None:
            shown = state
        yield shown, finals > 1


class _Verdict(NamedTuple):
    state: str
    reason: str
    code: int | None = None
    ended: float | None = None


def _judge(files: RunFiles, jobs: Mapping[str, JobState | None] | None, now: float) -> RunState:
    jobs = None if jobs is None else {key: _own(job, files.header) for key, job in jobs.items()}
    last = files.attempts[-1] if files.attempts else None
    verdict, job_id, follow_up = _verdict(files, jobs, last, now)
    job = (jobs or {}).get(job_id or "")
    # The attempt that the state is of, if that has begun.
    is_own = last is not None and last.job_id == job_id and not _is_again(last, job) and "array" not in files.header
    of = last if is_own else None
    started = of.started if of is not None else None
    if started is None and job is not None and job.state not in _WAITING:
        started = clock(job.start)
    ended = verdict.ended if verdict.state in FINAL else None
    active = verdict.state in ("starting", "running")
    until = now if active else ended
    minutes = job.time_limit if job is not None else None
    figures = progress(files.path / "metrics.jsonl")
    left = figures.pop("left")
    return RunState(
        name=files.path.name,
        path=files.path,
        state=verdict.state,
        reason=verdict.reason,
        job_id=job_id if job_id is not None and job_id.isdigit() else None,
        next=follow_up,
        nodes=(of.nodes if of is not None else "") or (job.nodes if job is not None else ""),
        started=started,
        ended=ended,
        elapsed=max(0.0, until - started) if until is not None and started is not None else None,
        limit=minutes * 60.0 if minutes is not None else _limit(files.header),
        left=left if active else None,
        checkpoint=checkpoint(files.path),
        code=_code(verdict) if verdict.state in FINAL else None,
        attempts=tuple(files.attempts),
        max_attempts=next((each.max_attempts for each in reversed(files.attempts) if each.max_attempts), None),
        **figures,
    )


def _verdict(
    files: RunFiles, jobs: Mapping[str, JobState | None] | None, last: Attempt | None, now: float
) -> tuple[_Verdict, str | None, str | None]:
    """The verdict, the job that it is of, and the follow-up behind that one."""
    if last is not None and "array" in files.header:
        array = files.order[-1] if files.order else last.job_id
        state = array_state(files, (jobs or {}).get(array or ""), jobs is not None, now)
        return _Verdict(*state), array, None
    if last is not None:
        verdict = _verdict_of_attempt(last, files, jobs, now)
        if files.waiting is None or verdict.state not in FINAL:
            return verdict, last.job_id, files.waiting
    return _verdict_of_waiting(files.waiting, files, jobs, last), files.waiting, None


def _own(job: JobState | None, header: Mapping[str, str]) -> JobState | None:
    """None where the id is of another job: of another cluster that sees the same files, or after ids began anew."""
    name = header.get("job-name")
    return job if job is None or name is None or job.name == name else None


def _verdict_of_waiting(
    job_id: str | None, files: RunFiles, jobs: Mapping[str, JobState | None] | None, last: Attempt | None
) -> _Verdict:
    """Of a run whose last job has not begun, as far as its files tell."""
    follows = last is not None and job_id not in files.order
    queued = "going on" if follows else "queued"
    what = f"follow-up job {job_id}" if follows else f"job {job_id}"
    if job_id is None or not job_id.isdigit():
        return _Verdict("never started", "there is no record of an attempt")
    if jobs is None:
        return _Verdict(queued, f"{what}, as far as its files tell: Slurm was not asked")
    job = jobs.get(job_id)
    if job is None:
        return _Verdict("lost" if follows else "never started", f"Slurm has forgotten {what}, which never began")
    if job.state in _WAITING:
        return _Verdict(queued, _why(job, f"{what}: " if follows else ""))
    if not job.is_final:
        return _Verdict("starting", f"0 of {count_nodes(job.nodes) or 1} nodes ready")
    ended = clock(job.end)
    if job.state == "CANCELLED":
        return _Verdict("cancelled", f"{what} was cancelled before it began", None, ended)
    if job.state in ("COMPLETED", "FAILED"):
        where = files.path / f"slurm-{job_id}.out"
        return _Verdict("failed", f"{what} ended before its attempt began: see {where}", job.code or 1, ended)
    return _Verdict("never started", how_it_ended(job.state), None, ended)


def _why(job: JobState, prefix: str) -> str:
    expected = f", expected to start at {_moment(job.start)}" if job.start is not None else ""
    return f"{prefix}{why_it_waits(job.reason)}{expected}"


def _verdict_of_attempt(
    attempt: Attempt, files: RunFiles, jobs: Mapping[str, JobState | None] | None, now: float
) -> _Verdict:
    if attempt.job_id is None:
        return _verdict_of_local(attempt, files, now)
    job = (jobs or {}).get(attempt.job_id)
    if job is not None and job.state in _WAITING:
        return _Verdict("going on", _why(job, f"job {job.job_id} is queued again: "))
    if job is not None and _is_again(attempt, job):
        return _Verdict("starting", f"0 of {count_nodes(job.nodes) or 1} nodes ready")
    if attempt.has_record or (attempt.has_ended and (job is None or job.is_final)):
        return _verdict_of_end(attempt)
    if job is not None and job.is_final:
        return _verdict_of_job(job)
    silent = silence(attempt, now)
    if job is None and silent > SILENCE:
        if heartbeats(attempt) or reports(attempt) or jobs is not None:
            return _without_end(attempt, files, f"no sign of life for {duration(silent)}, and no record of its end")
        return _Verdict("running", f"as far as its files tell, {duration(silent)} old: Slurm was not asked")
    return _active(attempt, files, job, silent)


def _is_again(attempt: Attempt, job: JobState | None) -> bool:
    """Whether Slurm has queued the attempt's job again since."""
    if job is None or job.is_final or job.restarts is None:
        return False
    return job.state in _WAITING or job.restarts > restart_of(attempt.folder)


def _active(attempt: Attempt, files: RunFiles, job: JobState | None, silent: float) -> _Verdict:
    notes = []
    if len(files.attempts) > 1:
        notes.append(f"attempt {len(files.attempts)}{f' of {attempt.max_attempts}' if attempt.max_attempts else ''}")
    if job is not None and job.state not in ("RUNNING", "CONFIGURING"):
        notes.append(job.state.lower())
    if silent > SILENCE and heartbeats(attempt):
        notes.append(f"no sign of life for {duration(silent)}")
    if (attempt.folder / "driver.log").exists():
        return _Verdict("running", ", ".join(notes))
    meet = attempt.folder / "bringup"
    ready = len(list(meet.glob("ready.*"))) + (meet / "head").exists()
    nodes = count_nodes(attempt.nodes or (job.nodes if job is not None else "")) or int(files.header.get("nodes", 1))
    return _Verdict("starting", ", ".join([f"{ready} of {nodes} nodes ready", *notes]))


def _verdict_of_end(attempt: Attempt) -> _Verdict:
    assert attempt.code is not None
    if attempt.cancelled:
        return _Verdict("cancelled", attempt.reason, attempt.code, attempt.ended)
    if attempt.code == 0:
        return _Verdict("done", "", 0, attempt.ended)
    words = attempt.reason or reports(attempt) or f"exit code {attempt.code}"
    if attempt.code == INTERRUPTED:
        words = words.removeprefix("interrupted: ")
        return _Verdict("interrupted", f"{words}; submit it again to go on", attempt.code, attempt.ended)
    return _Verdict("failed", words, attempt.code, attempt.ended)


def _verdict_of_job(job: JobState) -> _Verdict:
    """Of an attempt without a record of its end, whose job has ended in Slurm."""
    state = {"COMPLETED": "done", "CANCELLED": "cancelled", "FAILED": "failed"}.get(job.state, "lost")
    words = f"exit code {job.code}" if state == "failed" else how_it_ended(job.state) if state == "lost" else ""
    return _Verdict(state, words, job.code, clock(job.end))


def _verdict_of_local(attempt: Attempt, files: RunFiles, now: float) -> _Verdict:
    if attempt.has_ended:
        return _verdict_of_end(attempt)
    start = read_json(attempt.folder / "start.json") or {}
    if start.get("nodes") not in (None, os.uname().nodename):
        if silence(attempt, now) <= SILENCE:
            return _Verdict("running", f"on {attempt.nodes}")
    elif supervisor(start) is not None:
        return _active(attempt, files, None, 0.0)
    return _without_end(attempt, files, "its process is gone, and there is no record of its end")


def _without_end(attempt: Attempt, files: RunFiles, words: str) -> _Verdict:
    """An older slurmkit's attempts have no record: those that made their last step are done."""
    ended = last_written(attempt)
    if said := reports(attempt):
        return _Verdict("failed", said, 75, ended)
    figures = progress(files.path / "metrics.jsonl")
    if attempt.started is None and figures["step"] is not None and figures["step"] == figures["last_step"]:
        return _Verdict("done", "", 0, ended)
    return _Verdict("lost", words, None, ended)


def supervisor(start: Mapping[str, Any]) -> int | None:
    """The process id of a local run's slurmkit, if that process is still the one which wrote `start`."""
    pid, started = start.get("pid"), number(start.get("started"))
    if not isinstance(pid, int) or started is None:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        boot = re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    assert boot is not None
    began = int(boot[1]) + int(stat[19]) / os.sysconf("SC_CLK_TCK")
    # A later process of the same number began after that one had ended.
    same = began <= started + 1 and b"slurmkit" in words and stat[0] != "Z"
    return pid if same else None


def _code(verdict: _Verdict) -> int:
    """The exit code that `wait` ends with."""
    if verdict.code is not None:
        return verdict.code
    return {"done": 0, "cancelled": 143, "interrupted": INTERRUPTED}.get(verdict.state, 1)


def _limit(header: Mapping[str, str]) -> float | None:
    from slurmkit.job.values import minutes_of

    try:
        return minutes_of(header["time"]) * 60 or None
    except (KeyError, ValueError):
        return None


def duration(seconds: float) -> str:
    """Such as 0:42, 1:02:03 or 2-03:04:05."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}-{hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def _moment(text: str) -> str:
    """Such as `14:30`, with its date on another day."""
    return text[:16].replace("T", " ").removeprefix(f"{date.today()} ")
