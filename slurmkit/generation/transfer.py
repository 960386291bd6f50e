"""Weights from the policy's ranks to the engines: which way each engine gets them, and what both sides are told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurmkit.errors import Failure, NodeFailure
from slurmkit.generation.actors import Actor
from slurmkit.generation.weights import Way

# Seconds that the others have to say how they stand after one has failed.
_GRACE = 30.0


class PolicyLost(NodeFailure):
    """A policy rank died, so that no other engine would get the weights either."""


class WeightTransfer:
    """Brings engines the policy's weights. Every call ends, by its actor's timeout.

    Engines that read what lies somewhere are served one by one, and later as well; those of a channel together, and
    where one was started again, alone.
    """

    def __init__(
        self,
        ranks: Sequence[Actor],
        address: str,
        engines: Sequence[Actor],
        ways: Sequence[Way],
        *,
        processes: int = 1,
        folder: Path,
    ) -> None:
        """`address` is rank 0's node; each engine has its way and so many `processes`. `folder` is seen by all nodes,
        for the way `disk`."""
        self._ranks = ranks
        self._address = address
        self._engines = engines
        self._ways = ways
        self._processes = processes
        self._folder = folder
        self._told: dict[Way, Any] = {}
        self._connected: dict[Way, list[Any]] = {}
        self._one_at_a_time = asyncio.Lock()

    def parties(self) -> list[list[int]]:
        """Numbers of the engines that are served together, party by party."""
        together: dict[Way, list[int]] = {}
        alone = list[list[int]]()
        for number, way in enumerate(self._ways):
            if way in ("broadcast", "ipc"):
                together.setdefault(way, []).append(number)
            else:
                alone.append([number])
        return [*together.values(), *alone]

    async def prepare(self) -> None:
        """Lay the policy's weights, as they are now, where engines will read them: in the place of the last ones."""
        ways = sorted(set(self._ways))
        calls = {rank.name: rank.call("lay_weights", ways, str(self._folder)) for rank in self._ranks}
        found = await _all("the policy's weights could not be laid out", calls, policy=self._ranks)
        self._told = found[self._ranks[0].name]

    async def send(self, numbers: Sequence[int]) -> bool:
        """Bring one party, or one engine of it, what was prepared last. False where the policy has gone on since, so
        that the engine has newer weights than those: it is not to be used before the next ones are there.

        A failure says how every actor of both sides stands; it is PolicyLost where a policy rank is gone.
        """
        way = self._ways[numbers[0]]
        engines = [self._engines[number] for number in numbers]
        told = self._told[way]
        what = f"the weights of version {told.version} did not get to the engines ({way})"
        if way not in ("broadcast", "ipc"):
            await _all(what, {engine.name: engine.call("load", told) for engine in engines})
            return True
        async with self._one_at_a_time:
            await self._connect(way, engines)
            sending = {rank.name: rank.call("stream_weights", way, told.table) for rank in self._ranks}
            loading = {engine.name: engine.call("load", told) for engine in engines}
            found = await _all(what, {**sending, **loading}, policy=self._ranks)
        version, sent = found[self._ranks[0].name]
        for name in loading:
            if wrong := [arrived for arrived in found[name] if arrived != sent]:
                raise Failure(
                    f"the weights of version {version} changed on the way to {name}: SHA-256 {sent} was sent, "
                    f"{wrong[0]} arrived"
                )
        return bool(version == told.version)

    async def _connect(self, way: Way, engines: Sequence[Actor]) -> None:
        """Open the channel to these engines, unless it is; the last one to others is left."""
        handles = [engine.handle for engine in engines]
        before = self._connected.pop(way, [])
        if len(before) != len(handles) or any(one is not other for one, other in zip(before, handles, strict=True)):
            first = self._ranks[0]
            port = await first.call("open_channel", self._address)
            size = 1 + self._processes * len(engines)
            calls = {rank.name: rank.call("connect", way, self._address, port, size) for rank in self._ranks}
            for number, engine in enumerate(engines):
                told = (way, self._address, port, 1 + self._processes * number, size, first.timeout_seconds)
                calls[engine.name] = engine.call("connect", *told)
            await _all(f"policy and engines could not be connected ({way})", calls, policy=self._ranks)
        self._connected[way] = handles


async def _all(what: str, calls: dict[str, Any], policy: Sequence[Actor] = ()) -> dict[str, Any]:
    """All values by name. Where one fails, a failure that says how each of them stands: a NodeFailure if one is."""
    tasks = {name: asyncio.ensure_future(call) for name, call in calls.items()}
    try:
        _, waiting = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks.values() if task.done() and task.exception() is not None]
        if failed and waiting:
            await asyncio.wait(waiting, timeout=_GRACE)
        errors = {name: task.exception() for name, task in tasks.items() if task.done()}
        if not any(errors.values()):
            return {name: task.result() for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
    if other := next((error for error in errors.values() if error and not isinstance(error, Failure)), None):
        raise other
    lost = {name for name, error in errors.items() if isinstance(error, NodeFailure)}
    kind = PolicyLost if lost & {rank.name for rank in policy} else NodeFailure if lost else Failure
    if len(tasks) == 1:
        raise kind(str(next(iter(errors.values()))))
    states = [str(errors[name] or f"{name}: done") if name in errors else f"{name}: still waiting" for name in tasks]
    raise kind(f"{what}: {'; '.join(states)}")
