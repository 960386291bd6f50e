"""Calling Ray actors so that every call ends: with a value, or with one message that names the actor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from slurmkit.errors import Failure, NodeFailure

Value = TypeVar("Value")

# Seconds that others have to fail after one that raised. A rank whose peer died raises sooner than Ray finds the death.
_GRACE = 30.0


@dataclass(slots=True)
class Actor:
    """A Ray actor with a name for messages: "policy rank 3" or "engine 0".

    `make` starts another like it in its place, where that is possible, and `is_placed` says whether its node is there.
    """

    name: str
    handle: Any
    timeout_seconds: float
    make: Callable[[], Any] | None = None
    is_placed: Callable[[], bool] = lambda: True

    def restart(self) -> None:
        """End the actor, in whatever state it is, and start another."""
        assert self.make is not None
        ray.kill(self.handle)
        self.handle = self.make()

    async def call_while_placed(self, method: str, *arguments: Any, every: float) -> Any:
        """As `call`, and NodeFailure as soon as the node is gone, on which Ray would wait for another: looked for
        `every` so many seconds."""
        called = asyncio.ensure_future(self.call(method, *arguments))
        try:
            while not (await asyncio.wait([called], timeout=every))[0]:
                if not self.is_placed():
                    raise NodeFailure(f"{self.name} died and cannot be started again: its node is gone")
            return called.result()
        finally:
            called.cancel()

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method's value.

        Failure names the actor where the method raised; NodeFailure where Ray or the actor's process is gone, or the
        call took longer than its timeout.
        """
        reference = getattr(self.handle, method).remote(*arguments)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), self.timeout_seconds)
        except ray.exceptions.RayTaskError as error:  # first, as it is also of the kind that was raised
            cause = error.cause if isinstance(error.cause, BaseException) else error
            is_ray = isinstance(cause, ray.exceptions.RayError) and not isinstance(cause, ray.exceptions.RayTaskError)
            kind = NodeFailure if is_ray or isinstance(cause, NodeFailure) else Failure
            what = str(cause).strip()
            if not isinstance(cause, Failure):
                what = f"{type(cause).__name__}: {what}"
            raise kind(f"{self.name} failed in {method}(): {what}") from error
        except TimeoutError:
            raise NodeFailure(
                f"{self.name} did not finish {method}() within {self.timeout_seconds:g} s "
                "(cluster.call_timeout_seconds)"
            ) from None
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
                # Ray appends the constructor's traceback; the exception is the last line.
                raise Failure(f"{self.name} could not be made: {str(error).splitlines()[-1]}") from error
            raise NodeFailure(f"{self.name} died before or during {method}(): {_reason(error)}") from error


def _reason(error: ray.exceptions.RayError) -> str:
    """What Ray says of a death, without its identifiers and advice; of one for memory, what was used and the limit."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("\t")]
    if len(lines) > 1 and lines[0] == ray.exceptions.ActorDiedError.BASE_ERROR_MSG:
        lines = lines[1:]
    return "; ".join(lines[:2]).partition(" If the process was killed by")[0]


async def together(*awaitables: Awaitable[Value]) -> list[Value]:
    """All values, or a failure: a NodeFailure if there is any. Ranks that wait for a dead one would wait for ever."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    except NodeFailure:
        raise
    except Failure:
        done, _ = await asyncio.wait(tasks, timeout=_GRACE)
        for task in done:
            if not task.cancelled() and isinstance(task.exception(), NodeFailure):
                task.result()
        raise
    finally:
        for task in tasks:
            task.cancel()
