"""Lines in the driver's log while a phase takes long, for `slurmkit run`, `watch` and `logs`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from slurmkit.grpo.interrupt import guarded
from slurmkit.grpo.metrics import say

Value = TypeVar("Value")
# Seconds until the first line of a phase, and between two lines.
_FIRST, _EVERY = 5.0, 10.0


@dataclass(slots=True)
class Count:
    """Number of finished episodes of a phase. `total` may grow, as dynamic sampling plays more."""

    done: int = 0
    total: int = 0

    def add(self) -> None:
        """Count one more finished episode."""
        self.done += 1

    def __str__(self) -> str:
        return f"{self.done} of {self.total} episodes" if self.total else ""


class Progress:
    """The lines of one phase.

    The first line comes after 5 s. The next ones come at most every 10 s: if more is done, or if the time has doubled.
    """

    def __init__(self, phase: str) -> None:
        self._phase, self._start = phase, time.monotonic()
        self._logged_after, self._logged = -math.inf, ""

    def log(self, done: str = "") -> None:
        """Log the phase and what is done if a line is due. Example: "step 4: rollout: 12 of 64 episodes, 25 s"."""
        seconds = time.monotonic() - self._start
        if seconds < max(_FIRST, self._logged_after + _EVERY):
            return
        if done == self._logged and seconds < 2 * self._logged_after:
            return
        self._logged_after, self._logged = seconds, done
        with suppress(OSError):  # a full disk must not end a run for such a line
            say(f"{self._phase}: {done}{', ' if done else ''}{seconds:.0f} s")


async def reported(phase: str, work: Awaitable[Value], count: Count | None = None) -> Value:
    """Return the value of `work`; log the phase, and the episodes of `count`, while it takes long."""
    return await guarded(work, _report(Progress(phase), count or Count()))


async def _report(progress: Progress, count: Count) -> NoReturn:
    while True:
        await asyncio.sleep(_FIRST)
        progress.log(str(count))
