"""The logs of a run as they grow: of its newest attempt, and then of the next one, until the run is over."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from slurmkit.errors import Failure, UserError
from slurmkit.run.attempts import Attempt, RunFiles
from slurmkit.run.state import Queue, RunState, read_states
from slurmkit.slurm.command import natural_order

# Bytes at a time, and how long a line may grow before it is shown in parts.
_BLOCK = 1 << 20
# Seconds between two questions to Slurm while the attempt seems to run, and while the next one is awaited.
_ASK_EVERY, _ASK_WAITING = 5.0, 2.0


class Line(NamedTuple):
    """A line of a log. Example: Line(2, "14", "driver", "step 3/250")."""

    attempt: int | None
    """Counted from 1; None before the first."""

    job_id: str | None
    source: str
    """`driver`, `job` (the job's own output), a node's name, or `slurmkit`, whose lines are remarks on the rest."""

    text: str


class Tail:
    """A file that grows, by whole lines. It may not be there yet, be replaced by another, or be cut."""

    def __init__(self, path: Path, last: int | None = None) -> None:
        """`last` skips all but the last lines of what is there now."""
        self._path = path
        self._file: FileIO | None = None
        self._begun = b""
        if self._open() and last is not None:
            self._skip(last)

    def read(self) -> Iterator[str]:
        """The lines that were finished since."""
        if self._file is None and not self._open():
            return
        yield from self._grown()
        assert self._file is not None
        with suppress(FileNotFoundError):  # moved away, and no new one there yet
            now, ours = self._path.stat(), os.fstat(self._file.fileno())
            if (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino):
                yield from self._grown()  # what came between the two looks
                yield from self.rest()
                if self._open():
                    yield from self._grown()

    def rest(self) -> Iterator[str]:
        """The line that nobody will finish any more."""
        if self._begun:
            yield self._begun.decode(errors="replace")
            self._begun = b""

    def _open(self) -> bool:
        try:
            file = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise Failure(f"{self._path} cannot be read: {error.strerror}") from None
        if self._file is not None:
            self._file.close()
        self._file, self._begun = file, b""
        return True

    def _grown(self) -> Iterator[str]:
        assert self._file is not None
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0)
            self._begun = b""
        while block := self._file.read(_BLOCK):
            *whole, self._begun = (self._begun + block).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
            if len(self._begun) > _BLOCK:
                yield from self.rest()

    def _skip(self, last: int) -> None:
        """To the beginning of the last lines, from the end: the file may be long."""
        assert self._file is not None
        position = end = self._file.seek(0, os.SEEK_END)
        found = b""
        while position > 0 and found.count(b"\n") <= last:
            position = max(0, position - _BLOCK)
            self._file.seek(position)
            found = self._file.read(min(_BLOCK, end - position - len(found))) + found
        pieces = found.split(b"\n")
        # The last piece is the line that is being written, or nothing.
        wanted = max(1, last + (pieces[-1] == b""))
        self._file.seek(end - len(b"\n".join(pieces[-wanted:])))


class Reader:
    """Reads one run's logs. `node` is a node's name or `all`, in place of the command's own log.

    `attempt` is a number, a job id, or the name of an attempt's folder; without it, it is the newest. `last` lines of
    each file are enough. UserError where there is no such attempt or node.
    """

    def __init__(
        self, run: Path, queue: Queue, node: str | None = None, attempt: str | None = None, last: int | None = None
    ) -> None:
        self._run, self._queue, self._node, self._last, self._only = run, queue, node, last, attempt
        self._looked = 0.0
        self._known: RunState | None = None
        self._asking: Thread | None = None
        self._mark: tuple[int | None, str | None] = None, None
        self._said: dict[str, str] = {}

    def lines(self, follow: bool, pause: Callable[[], None]) -> Iterator[Line]:
        """What is there, and with `follow` what comes, until the run is over; `pause` is called when nothing is new."""
        position, first = self._position(), True
        if self._only is None and (tasks := [each for each in RunFiles(self._run).attempts if each.task is not None]):
            others = ", ".join(f"{each.array}_{each.task}" for each in tasks[-8:])
            yield from self._say("tasks", f"an array of {len(tasks)} tasks so far: --attempt shows another ({others})")
        while True:
            over = yield from self._attempt(position, first, follow, pause)
            first = False
            if self._only is not None:
                if over:
                    yield from self._say("end", _end_of(RunFiles(self._run).attempts[position], position))
                return
            while len((state := self._state(_ASK_WAITING)).attempts) <= position + 1:
                if state.state not in ("starting", "running"):
                    if not state.is_final and state.attempts:
                        yield from self._say("end", _end_of(state.attempts[position], position))
                    yield from self._say("state", _in_words(state))
                if state.is_final or not follow:
                    return
                pause()
            if not follow:
                return
            yield from self._say("end", _end_of(state.attempts[position], position))
            position += 1

    def _attempt(
        self, position: int, first: bool, follow: bool, pause: Callable[[], None]
    ) -> Generator[Line, None, bool]:
        """One attempt's lines; whether nothing will be written for it any more. `first`: it was asked for."""
        tails: dict[str, Tail] = {}
        last = self._last if first else None  # what appears from now on is new, and shown as a whole
        while True:
            # Looked at before the files are read: then what was written until the end is read, too.
            attempts = RunFiles(self._run).attempts
            attempt = attempts[position] if position < len(attempts) else None
            over = position + 1 < len(attempts) or (attempt is not None and attempt.has_ended)
            if attempt is not None:
                self._mark = position + 1, attempt.job_id
                yield from self._say("attempt", _words_for(attempt, position))
            started = attempt is not None and (attempt.folder / "driver.log").exists()
            if not over and (follow or not started):
                # A log that is there does not wait for a Slurm that is slow to answer.
                state = self._glance() if started else self._state(_ASK_EVERY)
                if state is not None:
                    over = state.is_final
                    self._mark = self._mark if attempt is not None else (None, state.job_id)
                    if not over and state.state != "running":
                        yield from self._say("state", _in_words(state))
            paths = self._paths(attempt, over)
            if self._node is not None and not paths and (started or over):
                missing = f"attempt {position + 1} has no log of node {self._node}"
                if first:
                    raise UserError(f"{missing}, but of {', '.join(_node_logs(attempt)) or 'none'}")
                yield from self._say("node", missing)
            for source, path in paths.items():
                if source not in tails:
                    if len(paths) > 1 and self._node is None:
                        yield from self._say(source, f"{path}:")
                    tails[source] = Tail(path, self._last if over else last)
                yield from (Line(*self._mark, source, text) for text in tails[source].read())
                if over or not follow:
                    yield from (Line(*self._mark, source, text) for text in tails[source].rest())
            if over or not follow:
                break
            last = None
            pause()
        for name in tails if self._node else ():
            assert attempt is not None
            folder = attempt.folder / f"ray-{name}"
            if kept := sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()):
                yield from self._say("ray", f"Ray's logs of {name} are in {folder}: {', '.join(kept)}")
        return over

    def _say(self, kind: str, text: str) -> Iterator[Line]:
        if self._said.get(kind) != text:
            self._said[kind] = text
            yield Line(*self._mark, "slurmkit", text)

    def _state(self, seconds: float) -> RunState:
        """How the run stands, as known for no longer than that."""
        if self._asking is not None:
            self._asking.join()
        if self._known is None or time.monotonic() - self._looked > seconds:
            self._look()
        assert self._known is not None
        return self._known

    def _glance(self) -> RunState | None:
        """How the run stood when Slurm answered last."""
        idle = self._asking is None or not self._asking.is_alive()
        if idle and (self._known is None or time.monotonic() - self._looked > _ASK_EVERY):
            self._asking = Thread(target=self._look, daemon=True)
            self._asking.start()
        return self._known

    def _look(self) -> None:
        self._known = read_states([self._run], self._queue)[0]
        self._looked = time.monotonic()

    def _position(self) -> int:
        attempts = RunFiles(self._run).attempts
        if self._only is None:
            return max(0, len(attempts) - 1)
        # A small number is an attempt's, before it is a job's.
        for position in range(len(attempts)):
            if self._only == str(position + 1):
                return position
        for position in reversed(range(len(attempts))):
            attempt = attempts[position]
            if self._only in (attempt.job_id, attempt.name, f"{attempt.array}_{attempt.task}"):
                return position
        known = ", ".join(_words_for(attempt, position) for position, attempt in enumerate(attempts)) or "none yet"
        raise UserError(f"--attempt {self._only}: no attempt of {self._run.name}, which has {known}")

    def _paths(self, attempt: Attempt | None, over: bool) -> dict[str, Path]:
        """The files to show, by their source: without the command's own log those that tell why there is none."""
        logs = _node_logs(attempt)
        if self._node is not None:
            return {name: path for name, path in logs.items() if self._node in (name, "all")}
        if attempt is not None and (driver := attempt.folder / "driver.log").exists():
            return {"driver": driver}
        if not over:
            return {}
        output = self._run / f"slurm-{self._mark[1]}.out"
        shown = {"job": output} if output.exists() else {}
        return shown | {
            name: path for name, path in logs.items() if (path.parent / "bringup" / f"failed.{name}").exists()
        }


def _node_logs(attempt: Attempt | None) -> dict[str, Path]:
    """By the nodes' names, node2 before node10."""
    paths = attempt.folder.glob("node-*.log") if attempt is not None else ()
    found = {path.stem.removeprefix("node-"): path for path in paths}
    return {name: found[name] for name in sorted(found, key=natural_order)}


def _words_for(attempt: Attempt, position: int) -> str:
    job = f"job {attempt.job_id}" if attempt.job_id else "without Slurm"
    if attempt.task is not None:
        return f"task {attempt.array}_{attempt.task} ({job}){f' on {attempt.nodes}' if attempt.nodes else ''}"
    return f"attempt {position + 1} ({job}){f' on {attempt.nodes}' if attempt.nodes else ''}"


def _end_of(attempt: Attempt, position: int) -> str:
    if attempt.code is None:
        return f"attempt {position + 1} has left no record of its end"
    return (
        f"attempt {position + 1} ended with exit code {attempt.code}{f': {attempt.reason}' if attempt.reason else ''}"
    )


def _in_words(state: RunState) -> str:
    code = f", exit code {state.code}" if state.is_final else ""
    return f"{state.name} is {state.state}{code}{f': {state.reason}' if state.reason else ''}"
