"""What dead runs of this user left behind on this machine: processes, folders in /tmp, shared memory.

A run's processes carry SK_MARK in their environment, wherever they were reparented to: `local-PID.START`, after the
process that supervises a run without Slurm and when it began, or a job's `JOBID.RESTART`. A process that gives itself a
title overwrites its environment, as Ray's agents do: all of a session with the mark of a run without Slurm is that
run's, as such a run has sessions of its own. What carries no mark is never touched, nor what is somebody else's or a
container's, nor a job that was submitted from inside the run: it inherits the mark, but not the Slurm job.

`python leftovers.py MARK FD` is the guard of a run without Slurm, which `slurmkit run` starts by this file's path: this
module imports nothing of slurmkit.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

_LOCAL, _JOB = re.compile(r"local-(\d+)\.(\d+)"), re.compile(r"(\d+)\.\d+")
# Seconds that a process is given to leave, and in which a folder's Ray may not have been started yet.
_GRACE, _FRESH = 3.0, 600.0


class Process(NamedTuple):
    """A process that carries a run's mark. Example: Process(12, "raylet", "local-9.1234", "/w/results/x", 60.0)."""

    pid: int
    what: str
    mark: str
    run: str
    """The run directory, "" where the process does not say."""
    age: float
    """Seconds."""


class Leftovers(NamedTuple):
    """All that dead runs left, and the jobs of which nobody can say whether they are dead."""

    processes: tuple[Process, ...]
    paths: tuple[Path, ...]
    unknown: tuple[str, ...]


class _Seen(NamedTuple):
    """A process of this user, as /proc has it."""

    pid: int
    words: list[str]
    environment: dict[str, str]
    began: int
    """Clock ticks after the machine's start."""
    session: int
    same_namespace: bool
    """Whether the process ids that it knows are those that we see."""
    mark: str = ""
    """SK_MARK, also of a process that has overwritten it."""


def own_mark() -> str:
    """The mark of what this process supervises."""
    return f"local-{os.getpid()}.{_began(os.getpid())}"


def find(active_jobs: Callable[[], Collection[str] | None]) -> Leftovers:
    """Look once. `active_jobs`: ids of the user's jobs that have not ended, None where Slurm does not say.

    It is only asked where something carries a job's mark.
    """
    seen = _mine()
    # What is in a container that has process ids of its own is that container's.
    marked = [each for each in seen if each.mark and each.same_namespace]
    folders = [path for path in Path("/tmp").iterdir() if path.name.startswith(("sk-", "slurmkit-")) and _is_mine(path)]
    marks = {each.mark for each in marked} | {_mark_of(path) for path in folders}
    jobs = {mark for mark in marks if _JOB.fullmatch(mark)}
    # The shell that brought a job's Ray up is gone when its step is; it knows the attempt and carries no mark.
    in_step = {each.environment.get("SK_ATTEMPT") for each in seen if not each.mark}
    jobs -= {mark for mark in jobs if mark in in_step}
    active = active_jobs() if jobs else ()
    dead = set() if active is None else {mark for mark in jobs if mark.partition(".")[0] not in active}
    dead |= {mark for mark in marks if supervisor_is_gone(mark)}
    gone = [each for each in marked if each.mark in dead]
    living = [each for each in seen if each.mark not in dead]
    paths = [path for path in folders if _is_left(path, dead, gone, living)]
    paths += sorted(_shared_memory(gone) - _shared_memory(living))
    # A process that gives itself a title may write it over a part of its environment.
    told = [each.environment for each in gone if "SK_ATTEMPT_DIR" in each.environment]
    runs = {each.get("SK_MARK", ""): str(Path(each["SK_ATTEMPT_DIR"]).parent.parent) for each in told}
    processes = tuple(_told(each, runs.get(each.mark, "")) for each in gone)
    return Leftovers(processes, tuple(paths), tuple(sorted(jobs)) if active is None else ())


def end_run(mark: str, session: int | None = None) -> None:
    """End every process of the run with this mark, and all of `session`, in which its command was started.

    Remove its folders in /tmp and its shared memory as well.
    """
    sessions = {} if session is None else {session: mark}
    memory = _shared_memory([each for each in _mine(sessions) if each.mark == mark and each.same_namespace])
    end({mark}, sessions)
    # Ray creates its folder while it starts: look for it when nothing can create one any more.
    remove([*memory, *(path for path in Path("/tmp").glob("slurmkit-*") if _is_mine(path) and _mark_of(path) == mark)])


def end(marks: Collection[str], sessions: Mapping[int, str] = MappingProxyType({})) -> int:
    """End every process that carries one of these marks. Return how many cannot be ended.

    `sessions` are known to have the mark, whatever their processes carry.
    """
    left: list[_Seen] = []
    known = dict(sessions)
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + _GRACE
        asked: set[int] = set()
        while left := [each for each in _mine(known) if each.mark in marks and each.same_namespace]:
            # The processes that carry the mark may end first.
            known |= {each.session: each.mark for each in left if _LOCAL.fullmatch(each.mark)}
            for each in left:
                if each.pid not in asked:
                    asked.add(each.pid)
                    try:
                        os.kill(each.pid, number)
                    except OSError:
                        continue  # it has just ended
            if time.monotonic() > until:
                break
            time.sleep(0.1)
    return len(left)


def remove(paths: Collection[Path]) -> int:
    """Remove files and folders. Returns how many cannot be removed."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sum(map(os.path.lexists, paths))


def _mine(sessions: Mapping[int, str] = MappingProxyType({})) -> list[_Seen]:
    """Return this user's processes but this one. All in `sessions` have the mark there."""
    namespace, me = os.readlink("/proc/self/ns/pid"), os.geteuid()
    seen = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid != me or int(folder.name) == os.getpid():
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            pairs = (
                pair.partition("=") for pair in (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            )
            environment = {name: value for name, _, value in pairs if name.startswith(("SK_", "SLURM_JOB_ID"))}
            if _is_of_another_job(environment, (folder / "cgroup").read_text(errors="replace")):
                environment = {}
            session, began = _session_and_start(int(folder.name))
            same_namespace = os.readlink(folder / "ns/pid") == namespace
            mark = environment.get("SK_MARK", "")
            seen.append(_Seen(int(folder.name), words, environment, began, session, same_namespace, mark))
        except OSError:
            continue  # it has ended
    marked = {each.session: each.mark for each in seen if _LOCAL.fullmatch(each.mark)} | dict(sessions)
    return [each if each.mark else each._replace(mark=marked.get(each.session, "")) for each in seen]


def _is_of_another_job(environment: Mapping[str, str], cgroups: str) -> bool:
    """Return True if a process with a run's mark belongs to another Slurm job than the run."""
    mark = environment.get("SK_MARK", "")
    job = mark.partition(".")[0] if _JOB.fullmatch(mark) else environment.get("SK_OUTER_JOB", "")
    found = {environment.get("SLURM_JOB_ID", job), *re.findall(r"/job_(\d+)(?=/|$)", cgroups, re.MULTILINE)}
    return bool(mark) and found != {job}


def _session_and_start(pid: int) -> tuple[int, int]:
    # The command's name, in parentheses, may hold anything.
    facts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    if facts[0] in "ZX":
        raise ProcessLookupError
    return int(facts[3]), int(facts[19])


def _began(pid: int) -> int:
    return _session_and_start(pid)[1]


def supervisor_is_gone(mark: str) -> bool:
    """True if the mark is that of a run without Slurm, and the process that supervised the run has ended."""
    match = _LOCAL.fullmatch(mark)
    if match is None:
        return False
    try:
        return _began(int(match[1])) != int(match[2])
    except OSError:
        return True


def _mark_of(folder: Path) -> str:
    """Return the mark of the run that a folder in /tmp belongs to, "" if the folder does not name one."""
    if folder.name.startswith("sk-"):
        return folder.name.removeprefix("sk-")
    try:
        mark, namespace = (folder / "mark").read_text().split()
    except (OSError, ValueError):
        return ""
    # A container that shares /tmp may have process ids of its own.
    return mark if namespace == os.readlink("/proc/self/ns/pid") else ""


def _is_left(path: Path, dead: set[str], gone: list[_Seen], living: list[_Seen]) -> bool:
    if any(str(path) in word for each in living for word in each.words):
        return False
    if any(str(path) in word for each in gone for word in each.words):
        return True
    # A private Ray's folder may not say whose it is, and processes in a container may be out of sight.
    is_old = time.time() - path.stat().st_mtime > _FRESH
    mark = _mark_of(path)
    named = mark in dead if mark else is_old
    return named and not any(map(_answers, path.glob("r*/*/sockets/*")))


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(1)
        try:
            end.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # nobody knows
    return True


def _shared_memory(processes: Collection[_Seen]) -> set[Path]:
    """Files in /dev/shm that these processes have mapped."""
    found: set[Path] = set()
    for each in processes:
        try:
            maps = Path(f"/proc/{each.pid}/maps").read_text(errors="replace")
        except OSError:
            continue  # it has ended
        found |= {Path(name) for name in re.findall(r" (/dev/shm/.*)$", maps, re.MULTILINE)}
    return {path for path in found if path.is_file() and _is_mine(path)}


def _is_mine(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False  # gone meanwhile


def _told(process: _Seen, run: str) -> Process:
    first, *rest = process.words
    program = next((word for word in rest if not word.startswith("-")), "")
    age = float(Path("/proc/uptime").read_text().split()[0]) - process.began / os.sysconf("SC_CLK_TCK")
    what = f"{os.path.basename(first)} {os.path.basename(program)}".strip()
    return Process(process.pid, what, process.mark, run, age)


def _guard(mark: str, pipe: int) -> None:
    """Read the session of the run's command, wait until nobody holds the pipe's other end, then end the run."""
    with os.fdopen(pipe) as told:
        session = told.read()
    end_run(mark, int(session) if session else None)


if __name__ == "__main__":
    _guard(sys.argv[1], int(sys.argv[2]))
