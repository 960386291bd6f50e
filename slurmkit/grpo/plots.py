"""Redraws the run's plots beside the training, in a process of their own."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import TracebackType

from slurmkit.grpo.metrics import say

_TIMEOUT_SECONDS = 120.0
# A drawing takes some seconds of a processor that the training may need as well.
_PAUSE_SECONDS = 30.0


class Plots:
    """Used as a context, which ends with one drawing of everything that was logged."""

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self._drawing: asyncio.Task[None] | None = None
        self._not_before = 0.0

    def redraw(self) -> None:
        """Start drawing and return at once; not while one goes on, and half a minute after it began: a later one sees
        more."""
        if time.monotonic() >= self._not_before and (self._drawing is None or self._drawing.done()):
            self._not_before = time.monotonic() + _PAUSE_SECONDS
            self._drawing = asyncio.create_task(self._draw())

    async def _draw(self) -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "slurmkit.report",
            str(self._run_directory),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await asyncio.wait_for(child.communicate(), _TIMEOUT_SECONDS)
        except BaseException:
            child.kill()
            await child.wait()
            raise
        if child.returncode:
            # A run is not worth less for a plot that could not be drawn; metrics.jsonl has it all.
            reason = errors.decode(errors="replace").strip() or f"exit code {child.returncode}"
            say(f"the plots could not be drawn: {reason.splitlines()[-1]}")

    async def __aenter__(self) -> Plots:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawing is None:
            return
        if kind is not None and not issubclass(kind, Exception):  # asked to leave: the next attempt draws them
            self._drawing.cancel()
            await asyncio.gather(self._drawing, return_exceptions=True)
            return
        try:
            await self._drawing
            await self._draw()
        except TimeoutError:
            say(f"the plots could not be drawn within {_TIMEOUT_SECONDS:g} s")
