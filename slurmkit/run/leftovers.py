"""What dead runs of this user left behind on this machine: processes, folders in /tmp, shared memory.

A run's processes carry SK_MARK in their environment, wherever they were reparented to: `local-PID.START`, after the
process that supervises a run without Slurm and when it began, or a job's `JOBID.RESTART`. What carries no mark is never
touched, nor what is somebody else's or a container's.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
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
    same_namespace: bool
    """Whether the process ids that it knows are those that we see."""


def own_mark() -> str:
    """The mark of what this process supervises."""
    return f"local-{os.getpid()}.{_began(os.getpid())}"


def find(active_jobs: Callable[[], Collection[str] | None]) -> Leftovers:
    """Look once. `active_jobs`: ids of the user's jobs that have not ended, None where Slurm does not say.

    It is only asked where something carries a job's mark.
    """
    seen = list(_mine())
    # What is in a container that has process ids of its own is that container's.
    marked = [each for each in seen if "SK_MARK" in each.environment and each.same_namespace]
    folders = [path for path in Path("/tmp").iterdir() if path.name.startswith(("sk-", "slurmkit-")) and _is_mine(path)]
    jobs = {each.environment["SK_MARK"] for each in marked} | {path.name.removeprefix("sk-") for path in folders}
    jobs = {mark for mark in jobs if _JOB.fullmatch(mark)}
    # The shell that brought a job's Ray up is gone when its step is; it knows the attempt and carries no mark.
    in_step = {each.environment.get("SK_ATTEMPT") for each in seen if "SK_MARK" not in each.environment}
    jobs -= {mark for mark in jobs if mark in in_step}
    active = active_jobs() if jobs else ()
    dead = set() if active is None else {mark for mark in jobs if mark.partition(".")[0] not in active}
    dead |= {each.environment["SK_MARK"] for each in marked if _is_dead_here(each)}
    gone = [each for each in marked if each.environment["SK_MARK"] in dead]
    living = [each for each in seen if each.environment.get("SK_MARK") not in dead]
    paths = [path for path in folders if _is_left(path, dead, gone, living)]
    paths += sorted(_shared_memory(gone) - _shared_memory(living))
    # A process that gives itself a title may write it over a part of its environment.
    told = [each.environment for each in gone if "SK_ATTEMPT_DIR" in each.environment]
    runs = {each["SK_MARK"]: str(Path(each["SK_ATTEMPT_DIR"]).parent.parent) for each in told}
    processes = tuple(_told(each, runs.get(each.environment["SK_MARK"], "")) for each in gone)
    return Leftovers(processes, tuple(paths), tuple(sorted(jobs)) if active is None else ())


def end(marks: Collection[str]) -> int:
    """End every process that carries one of these marks. Returns how many cannot be ended."""
    left: list[_Seen] = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + _GRACE
        asked: set[int] = set()
        while left := [each for each in _mine() if each.environment.get("SK_MARK") in marks and each.same_namespace]:
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


def _mine() -> Iterator[_Seen]:
    namespace, me = os.readlink("/proc/self/ns/pid"), os.geteuid()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid != me or int(folder.name) == os.getpid():
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            pairs = (
                pair.partition("=") for pair in (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            )
            environment = {name: value for name, _, value in pairs if name.startswith("SK_")}
            pid = int(folder.name)
            yield _Seen(pid, words, environment, _began(pid), os.readlink(folder / "ns/pid") == namespace)
        except OSError:
            continue  # it has ended


def _began(pid: int) -> int:
    # The command's name, in parentheses, may hold anything.
    facts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    if facts[0] in "ZX":
        raise ProcessLookupError
    return int(facts[19])


def _is_dead_here(process: _Seen) -> bool:
    """Whether it is a local run's, and the supervisor is gone."""
    match = _LOCAL.fullmatch(process.environment["SK_MARK"])
    if match is None:
        return False
    try:
        return _began(int(match[1])) != int(match[2])
    except OSError:
        return True


def _is_left(path: Path, dead: set[str], gone: list[_Seen], living: list[_Seen]) -> bool:
    if any(str(path) in word for each in living for word in each.words):
        return False
    if any(str(path) in word for each in gone for word in each.words):
        return True
    # A private Ray's folder does not say whose it is, and processes in a container may be out of sight.
    is_old = time.time() - path.stat().st_mtime > _FRESH
    named = path.name.removeprefix("sk-") in dead if path.name.startswith("sk-") else is_old
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
    return Process(process.pid, what, process.environment["SK_MARK"], run, age)
