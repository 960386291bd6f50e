"""Signals that ask the run to leave: at once while nothing is worth saving, else where everything can be saved."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable
from types import FrameType
from typing import NoReturn, TypeVar

from slurmkit.errors import INTERRUPTED

Value = TypeVar("Value")
# USR2 is what Slurm sends before a time limit or a preemption, if asked to; TERM and INT may come from anybody.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """The run leaves in order; the text says what is saved. No Exception, as libraries catch those."""

    exit_code = INTERRUPTED

    def __init__(self, text: str = "interrupted before a step was finished: there is nothing to save") -> None:
        super().__init__(text)


class LeaveAtOnce(SystemExit):
    """The second signal's exit. Not SystemExit itself, which breaks an episode if an environment raises it."""


class Interrupts:
    """The first signal asks the run to leave in order, a second one but USR2 leaves at once with 128 + its number.

    Until `attend`, Interrupted is raised where the program stands; from then on, only out of `unless`.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_asked = False
        self._asked = asyncio.Event()
        for number in SIGNALS:
            signal.signal(number, self._arrived)

    def attend(self) -> None:
        """The event loop runs, and there will be something to save."""
        self._loop = asyncio.get_running_loop()

    async def unless(self, work: Awaitable[Value]) -> Value:
        """The value of `work`; Interrupted, with `work` cancelled, once the run was asked to leave."""
        return await guarded(work, self._until_asked())

    async def _until_asked(self) -> NoReturn:
        await self._asked.wait()
        raise Interrupted

    def _arrived(self, number: int, _: FrameType | None) -> None:
        if self._is_asked:
            if number == signal.SIGUSR2:
                return  # Slurm's own SIGTERM came first: it asks for the same
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)  # a third one does not even wait until Ray is down
            raise LeaveAtOnce(128 + number)
        self._is_asked = True
        if self._loop is None:
            raise Interrupted
        self._loop.call_soon_threadsafe(self._asked.set)


async def guarded(work: Awaitable[Value], guard: Awaitable[NoReturn]) -> Value:
    """The value of `work`, or what `guard` raises meanwhile; then `work` is cancelled."""
    tasks = working, guarding = asyncio.ensure_future(work), asyncio.ensure_future(guard)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await (guarding if guarding.done() else working)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
