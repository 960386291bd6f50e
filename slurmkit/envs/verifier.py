"""Whether two answers are the same thing, asked of math-verify in processes that may hang and die without harm."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from slurmkit.errors import UserError

Verdict = Literal["right", "wrong", "timed out", "crashed"]
FAILED: tuple[Verdict, ...] = ("timed out", "crashed")
"""No verdict of math-verify's: the pair counts as wrong."""

_MEMORY = 1 << 30
"""Bytes of address space of a process, which needs 0.06 GiB itself."""
_START_SECONDS = 180.0
"""sympy is many small files, and a shared disk may be slow."""
_SPARE_SECONDS = 5.0
"""After its time a process is ended by the kernel. This is for one that is not."""
_REMEMBERED = 100_000
"""Pairs whose verdict is kept: a run asks the same of a task's episodes again and again."""


class Verifier:
    """A few processes that are started when there is something to compare, and end with this one.

    Each has a thread that waits for it, so that an event loop never does. A process that takes longer than `seconds`
    over one pair, or dies, is replaced; its pair counts as wrong, and `failures` counts it.
    """

    def __init__(self, num_workers: int, seconds: float, *, say: Callable[[str], None] = print) -> None:
        """UserError where math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("env.name math compares answers by math-verify, which is not installed: slurmkit[train]")
        self.failures: Counter[Verdict] = Counter()
        self._num_workers, self._seconds, self._say = num_workers, seconds, say
        self._asked: SimpleQueue[tuple[str, str, Future[Verdict]] | None] = SimpleQueue()
        self._known: dict[tuple[str, str], Future[Verdict]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._num_waiting = 0

    async def compare(self, answer: str, truth: str) -> Verdict:
        """Whether `answer` is right; a pair that was asked for before is not asked for again.

        RuntimeError where no process can be started.
        """
        found = self._known.get((answer, truth))
        if found is None:
            while len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            found = self._known[answer, truth] = Future()
            self._ask(answer, truth, found)
        # Several episodes wait for one pair: one that gives up must not cancel it for the others.
        return found.result() if found.done() else await asyncio.shield(asyncio.wrap_future(found))

    def close(self) -> None:
        """End the processes, once what was asked for is answered."""
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _ask(self, answer: str, truth: str, found: Future[Verdict]) -> None:
        with self._lock:
            self._num_waiting += 1
            is_short = self._num_waiting > len(self._threads) < self._num_workers
        if is_short:
            # A daemon: the end of the driver waits for no answer.
            thread = threading.Thread(target=self._work, name="verifier", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._asked.put((answer, truth, found))

    def _work(self) -> None:
        process: _Process | None = None
        while (task := self._asked.get()) is not None:
            answer, truth, found = task
            try:
                process = process or _Process(self._seconds)
                verdict = process.compare(answer, truth)
            except Exception as error:
                with self._lock:
                    self._num_waiting -= 1
                self._known.pop((answer, truth), None)
                found.set_exception(RuntimeError(f"math-verify cannot be asked: {error}"))
                continue
            if verdict in FAILED:
                process.end()
                process = None
            self._note(verdict, answer, truth)
            found.set_result(verdict)
        if process is not None:
            process.end()

    def _note(self, verdict: Verdict, answer: str, truth: str) -> None:
        with self._lock:
            self._num_waiting -= 1
            if verdict not in FAILED:
                return
            self.failures[verdict] += 1
            count = self.failures[verdict]
        if count.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …: a policy may find a thousand of them
            limit = f" after {self._seconds:g} s" if verdict == "timed out" else ""
            self._say(
                f"math-verify {verdict}{limit} over {answer[:100]!r} beside {truth[:100]!r}, which counts as wrong: "
                f"for the {count}. time"
            )


class _Process:
    """One process. RuntimeError, with what it says, where it does not start."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # -P: the folder of this file holds a math.py, which is not Python's.
        program = str(Path(__file__).with_name("verifier_process.py"))
        self._popen = subprocess.Popen(
            [sys.executable, "-P", program, str(seconds), str(_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        if self._read(_START_SECONDS) != b"ready\n":
            self.end()
            said = self._popen.stderr.read().decode(errors="replace").strip() if self._popen.stderr else ""
            raise RuntimeError(said.splitlines()[-1] if said else f"it did not start within {_START_SECONDS:g} s")

    def compare(self, answer: str, truth: str) -> Verdict:
        """Blocks; after `timed out` and `crashed` this process is of no more use."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps({"answer": answer, "truth": truth}).encode() + b"\n")
        except BrokenPipeError:
            return "crashed"
        line = self._read(self._seconds + _SPARE_SECONDS)
        if line:
            return "right" if json.loads(line) else "wrong"
        return "timed out" if line is None or self._popen.wait() == -signal.SIGALRM else "crashed"

    def end(self) -> None:
        """Now, whatever it does."""
        self._popen.kill()
        self._popen.wait()

    def _read(self, seconds: float) -> bytes | None:
        """A line, nothing where the process ended, None where there is none in time."""
        assert self._popen.stdout is not None
        poll = select.poll()
        poll.register(self._popen.stdout, select.POLLIN)
        return self._popen.stdout.read(64) if poll.poll(1000 * seconds) else None
