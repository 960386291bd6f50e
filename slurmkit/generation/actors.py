"""Calling Ray actors so that every call ends: with a value, or with one message that names the actor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from slurmkit.errors import Failure

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Actor:
    """A Ray actor with a name for messages: "policy rank 3" or "engine 0"."""

    name: str
    handle: Any
    timeout_seconds: float

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method's value. Failure names the actor where it died, raised, or took longer than its timeout."""
        reference = getattr(self.handle, method).remote(*arguments)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), self.timeout_seconds)
        except TimeoutError:
            raise Failure(
                f"{self.name} did not finish {method}() within {self.timeout_seconds:g} s "
                "(cluster.call_timeout_seconds)"
            ) from None
        except ray.exceptions.RayActorError as error:
            lines = str(error).strip().splitlines()
            # Where a constructor raised, Ray appends its traceback; the exception is the last line.
            reason = lines[-1] if "creation task" in lines[0] else lines[0]
            raise Failure(f"{self.name} died before or during {method}(): {reason}") from error
        except ray.exceptions.RayTaskError as error:
            raise Failure(f"{self.name} failed in {method}(): {_root(error)}") from error


def _root(error: ray.exceptions.RayTaskError) -> str:
    cause = error.cause if isinstance(error.cause, BaseException) else error
    return f"{type(cause).__name__}: {str(cause).strip()}"


async def together(*awaitables: Awaitable[Value]) -> list[Value]:
    """All values; the first failure ends the wait at once. Ranks that wait for a dead one would wait for ever."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
