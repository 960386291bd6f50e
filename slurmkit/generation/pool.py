"""All engines behind one coroutine: an episode asks for a completion and does not know who else asks, or where."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any

from slurmkit.generation.actors import Actor, together
from slurmkit.generation.engine import Completion, Request, SamplingParams

_Asked = asyncio.Future[Completion]


@dataclass(slots=True)
class _Slot:
    """An engine and what it has been given, by ticket."""

    engine: Actor
    in_flight: dict[int, _Asked] = field(default_factory=dict)


class EnginePool:
    """Shares out requests over engines. Used as `async with EnginePool(engines) as pool`."""

    def __init__(self, engines: Sequence[Actor], max_batch_size: int, *, continuous: bool = False) -> None:
        """`continuous` engines take up to `max_batch_size` requests at any time, others only when they have none."""
        self._slots = [_Slot(engine) for engine in engines]
        self._max_batch_size = max_batch_size
        self._continuous = continuous
        self._waiting: deque[tuple[int, Request, _Asked]] = deque()
        self._tickets = count()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> EnginePool:
        self._start(self._share_out())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """One completion. Failure where the engine that had the request died or overran its deadline."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((next(self._tickets), Request(tuple(prompt_ids), sampling), future))
        self._changed.set()
        completion: Completion = await future
        return completion

    async def load(self, weights: Sequence[object]) -> None:
        """Give each engine its new weights: a Ray reference, as the driver never fetches them."""
        await together(*(slot.engine.call("load", own) for slot, own in zip(self._slots, weights, strict=True)))

    async def _share_out(self) -> None:
        """Keep all engines equally busy.

        Consumes waiting requests. Waits for: a request, or an engine that has become free. Produces work for engines.
        Unblocked by: `generate`, `_work`.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            free = [slot for slot in self._slots if not slot.in_flight or self._continuous]
            # The busiest first: what it has too much of, the others have to have less of.
            free.sort(key=lambda slot: len(slot.in_flight), reverse=True)
            while self._waiting and free:
                level = math.ceil((len(self._waiting) + sum(len(slot.in_flight) for slot in free)) / len(free))
                slot = free.pop(0)
                room = min(level, self._max_batch_size) - len(slot.in_flight)
                batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                if batch:
                    is_idle = not slot.in_flight
                    slot.in_flight |= {ticket: future for ticket, _, future in batch}
                    self._start(self._submit(slot, {ticket: request for ticket, request, _ in batch}))
                    if is_idle:
                        self._start(self._work(slot))

    async def _submit(self, slot: _Slot, requests: Mapping[int, Request]) -> None:
        try:
            await slot.engine.call("submit", requests)
        except Exception as error:
            self._fail(slot, error)

    async def _work(self, slot: _Slot) -> None:
        """Pass on what an engine finishes for as long as it has something to do; its failure is that of all it has."""
        try:
            while slot.in_flight:
                finished: Mapping[int, Completion] = await slot.engine.call("collect")
                for ticket, completion in finished.items():
                    future = slot.in_flight.pop(ticket)
                    if not future.done():
                        future.set_result(completion)
                self._changed.set()
        except Exception as error:
            self._fail(slot, error)

    def _fail(self, slot: _Slot, error: Exception) -> None:
        for future in slot.in_flight.values():
            if not future.done():
                future.set_exception(error)
        slot.in_flight.clear()
        self._changed.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
