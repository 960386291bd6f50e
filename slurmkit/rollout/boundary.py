"""Calls of an environment or an agent: whatever it does wrong breaks its own episode, and nothing else."""

from __future__ import annotations

import asyncio
import signal
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from types import coroutine
from typing import Any, TypeVar, cast

from slurmkit.envs.environment import Task
from slurmkit.rollout.contract import ContractError

Answer = TypeVar("Answer")

_MOST_CHARS = 500


class BrokenEnvironment(Exception):
    """The environment failed, or returned a value against its contract: the episode says nothing about the policy."""

    def __init__(self, task: Task, environment: object, error: BaseException) -> None:
        what = _description(error)
        if not isinstance(error, ContractError):
            what = f"{type(error).__name__}: {what}"
        text = f"task {task.name}: {type(environment).__qualname__}: {what}"
        # The text is printed, and a log is UTF-8.
        super().__init__(text.encode(errors="backslashreplace").decode())


def _description(error: BaseException) -> str:
    text = "an error that has no text"
    with suppress(Exception):
        text = str(error)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"


async def asked(
    call: Callable[[], Awaitable[Any]],
    check: Callable[[Any], Answer],
    task: Task,
    environment: object,
    timeout_seconds: float | None,
    passes: tuple[type[Exception], ...] = (),
) -> Answer:
    """Call the environment, and return the checked value.

    Raises BrokenEnvironment if the call raises, takes longer than `timeout_seconds`, or returns a value that `check`
    refuses. `passes` go through. So does all that is not the environment's: a cancellation of the running task,
    KeyboardInterrupt, and exceptions of signal handlers, which surface wherever the program stands.
    """
    running = cast("asyncio.Task[Any]", asyncio.current_task())
    cancellations = running.cancelling()
    try:
        value = check(await _in_time(call(), timeout_seconds))
    except passes:
        raise
    except BaseException as error:
        if running.cancelling() > cancellations:
            # An environment may raise another exception in its place.
            raise asyncio.CancelledError from error
        if _is_the_environments(error):
            raise BrokenEnvironment(task, environment, error) from error
        raise
    if running.cancelling() > cancellations:
        raise asyncio.CancelledError  # which the environment has swallowed
    return value


def _is_the_environments(error: BaseException) -> bool:
    """Return whether the error breaks the episode.

    asyncio.CancelledError does: the running task was not cancelled, but something that the environment waited for.
    SystemExit does as well, as code under a tool may call exit(), which would end the run with exit code 0. A signal
    handler that raises SystemExit means the process.
    """
    if type(error) is SystemExit:
        codes = [getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()]
        return not any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, Exception | asyncio.CancelledError)


async def _in_time(answer: Any, timeout_seconds: float | None) -> Any:
    if not isinstance(answer, Coroutine):
        raise ContractError(f"its methods must be coroutines (async def), one returned {type(answer).__name__}")
    try:
        waits_for = answer.send(None)
    except StopIteration as done:  # at once, as most do: a deadline would cost the driver more than the answer
        return done.value
    async with asyncio.timeout(timeout_seconds):
        return await _rest(answer, waits_for)


@coroutine
def _rest(answer: Coroutine[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, Any]:
    """A coroutine from its first wait on."""
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:
            resume = partial(answer.throw, error)
        else:
            resume = partial(answer.send, sent)
        try:
            waits_for = resume()
        except StopIteration as done:
            return done.value
