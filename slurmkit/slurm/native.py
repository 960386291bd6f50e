"""Slurm through pyslurm, in a child process: reads and control. Submission stays with sbatch (docs/pyslurm.md)."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from slurmkit.errors import Failure
from slurmkit.slurm import command, parse
from slurmkit.slurm.client import Estimate, JobState, JobUsage, Node, Partition

# Seconds for a child to import pyslurm, and for an answer. For a missing slurm.conf libslurm would look a minute long.
START = 15
DEADLINE = command.DEADLINE
_noticed = False
_Answer = TypeVar("_Answer")


class Unusable(Exception):
    """pyslurm cannot be used here, for this reason."""


class NativeClient:
    """SlurmClient over pyslurm in the interpreter `python`, and over the commands from where pyslurm cannot be used."""

    def __init__(self, commands: command.CommandClient, python: str) -> None:
        self._commands = commands
        self._python = python
        self._child: _Child | None = None
        self._given_up = False

    def test(self, script: str) -> Estimate:
        """See SlurmClient."""
        return self._commands.test(script)

    def submit(self, script: Path, environment: Mapping[str, str] = {}) -> str:
        """See SlurmClient."""
        return self._commands.submit(script, environment)

    def jobs_of(self, script: Path) -> tuple[JobState, ...]:
        """See SlurmClient."""
        return self._commands.jobs_of(script)

    def script_of(self, job_id: str) -> bytes:
        """See SlurmClient."""
        return self._commands.script_of(job_id)

    def keeps_environments(self) -> bool:
        """See SlurmClient."""
        return self._commands.keeps_environments()

    def job(self, job_id: str) -> JobState | None:
        """See SlurmClient."""
        return command.first_of(self.jobs([job_id]))

    def jobs(self, job_ids: Sequence[str] = (), *, user: str = "") -> tuple[JobState, ...]:
        """See SlurmClient. Single tasks of arrays are left to the commands: pyslurm takes nothing but numbers."""
        if not user and not all(map(_is_number, job_ids)):
            return self._commands.jobs(job_ids)
        if not user and not job_ids:
            return ()
        user_id = command.user_id(user) if user else None
        numbers = [] if user else [int(job_id) for job_id in job_ids]
        found = self._either(lambda: self._commands.jobs(job_ids, user=user), _jobs_from, "jobs", numbers, user_id)
        return found if user else command.in_order((*found, *self.accounting(command.forgotten(job_ids, found))))

    def accounting(self, job_ids: Sequence[str]) -> tuple[JobState, ...]:
        """See SlurmClient."""
        if not job_ids or not all(map(_is_number, job_ids)):
            return self._commands.accounting(job_ids)
        numbers = [int(job_id) for job_id in job_ids]
        try:
            return self._either(lambda: self._commands.accounting(job_ids), _jobs_from, "accounting", numbers)
        except Failure:
            # pyslurm says the same of a site without accounting and of one whose slurmdbd is away.
            return self._commands.accounting(job_ids)

    def usage(self, job_ids: Sequence[str]) -> tuple[JobUsage, ...]:
        """See SlurmClient."""
        return self._commands.usage(job_ids)

    def cancel(self, job_id: str) -> None:
        """See SlurmClient."""
        self._control("cancel", job_id)

    def signal(self, job_id: str, name: str) -> None:
        """See SlurmClient."""
        self._control("signal", job_id, name)

    def requeue(self, job_id: str) -> None:
        """See SlurmClient."""
        self._control("requeue", job_id)

    def hold(self, job_id: str) -> None:
        """See SlurmClient."""
        self._control("hold", job_id)

    def release(self, job_id: str) -> None:
        """See SlurmClient."""
        self._control("release", job_id)

    def partitions(self) -> tuple[Partition, ...]:
        """See SlurmClient."""
        nodes = self.nodes()
        return self._either(
            self._commands.partitions,
            lambda rows: tuple(parse.partition_from(nodes, *row) for row in sorted(rows)),
            "partitions",
        )

    def nodes(self) -> tuple[Node, ...]:
        """See SlurmClient."""
        return self._either(self._commands.nodes, parse.nodes_from, "nodes")

    def _control(self, name: str, job_id: str, *more: str) -> None:
        same = getattr(self._commands, name)
        if _is_number(job_id):
            self._either(lambda: same(job_id, *more), lambda _: None, name, int(job_id), *more)
        else:
            same(job_id, *more)

    def _either(
        self, instead: Callable[[], _Answer], read: Callable[[Any], _Answer], name: str, *arguments: Any
    ) -> _Answer:
        if not self._given_up:
            try:
                self._child = self._child or _Child(self._python)
                return read(self._child.call(name, *arguments))
            except (Unusable, TypeError, ValueError) as reason:
                self._given_up = True
                self._end()
                _notice(reason)
            except Failure:
                raise
            except BaseException:
                # Whoever was interrupted here must not find this answer in place of the next.
                self._end()
                raise
        return instead()

    def _end(self) -> None:
        if self._child:
            self._child.end()
        self._child = None


class _Child:
    """serve.py in a process of its own, which libslurm may end whenever it likes."""

    def __init__(self, python: str) -> None:
        if "SLURM_CLUSTERS" in os.environ:
            raise Unusable("SLURM_CLUSTERS is set, and pyslurm asks nobody but the local cluster")
        # A socket, because unlike a pipe it has deadlines in both directions.
        self._socket, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._rest = b""
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [python, str(Path(__file__).with_name("serve.py"))],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=self._errors,
                    # Neither the working directory nor this one is a place to import from.
                    env={**command.submission_environment(), "PYTHONSAFEPATH": "1"},
                    start_new_session=True,
                )
            except OSError as error:
                raise Unusable(f"{python} does not start: {error.strerror}") from None
        self.end = weakref.finalize(self, _end, self._process, self._socket, self._errors)
        try:
            self._check(self._answer(START)["version"])
        except BaseException:
            self.end()
            raise

    def call(self, name: str, *arguments: Any) -> Any:
        """pyslurm's answer; Failure where Slurm refuses, Unusable where pyslurm fails."""
        try:
            self._socket.settimeout(DEADLINE)
            self._socket.sendall(json.dumps([name, arguments]).encode() + b"\n")
        except OSError:
            raise self._ended() from None
        answer = self._answer(DEADLINE)
        if "refused" in answer:
            raise Failure(f"Slurm, asked through pyslurm ({name}): {answer['refused']}")
        if "broken" in answer:
            raise Unusable(f"it failed at {name}: {answer['broken']}")
        return answer["answer"]

    def _answer(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            try:
                self._socket.settimeout(max(until - time.monotonic(), 0.001))
                chunk = self._socket.recv(1 << 20)
            except TimeoutError:
                raise Unusable(f"it gave no answer within {seconds} s{self._last_words()}") from None
            except OSError:
                chunk = b""
            if not chunk:
                raise self._ended()
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> Unusable:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return Unusable("its process closed the connection")
        return Unusable(f"its process ended with {status}{self._last_words()}")

    def _last_words(self) -> str:
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return last and f": {last}"

    def _check(self, version: str) -> None:
        try:
            release = command.release()
        except Failure as error:
            raise Unusable(str(error)) from None
        if [int(part) for part in re.findall(r"\d+", version)[:2]] != list(release):
            raise Unusable(f"pyslurm {version} is not made for Slurm {release[0]}.{release[1]:02}")


def _end(process: subprocess.Popen[bytes], *files: Any) -> None:
    for file in files:
        file.close()
    process.kill()
    process.wait()


def _is_number(job_id: str) -> bool:
    return job_id.isascii() and job_id.isdigit()


def _jobs_from(rows: list[list[Any]]) -> tuple[JobState, ...]:
    return command.in_order(JobState(*row) for row in rows)


def _notice(reason: Exception) -> None:
    global _noticed
    if not _noticed:
        _noticed = True
        words = " ".join(str(reason).split())
        print(f"notice: pyslurm is not used: {words}; Slurm's own commands are used instead", file=sys.stderr)
