"""All engines behind one coroutine: an episode asks for a completion and does not know who else asks, or where."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any

from slurmkit.errors import Failure, NodeFailure
from slurmkit.generation.actors import Actor, together
from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.generation.transfer import PolicyLost, WeightTransfer

_ALIVE_SECONDS = 2.0
_MAX_TRIES = 3


@dataclass(slots=True, eq=False)
class _Asked:
    """A request, who waits for its completion, which engine has it since when, and where it got nowhere before."""

    ticket: int
    request: Request
    future: asyncio.Future[Completion]
    slot: _Slot | None = None
    since: float = 0.0
    tried: list[_Slot] = field(default_factory=list)


@dataclass(slots=True)
class _Slot:
    """A place for an engine, and what the engine there has been given, by ticket."""

    number: int
    engine: Actor
    in_flight: dict[int, _Asked] = field(default_factory=dict)
    restarts: int = 0
    restarting: asyncio.Task[None] | None = None
    worker: asyncio.Task[None] | None = None
    busy_since: float | None = None
    aborting: list[int] = field(default_factory=list)
    is_ahead: bool = False
    """Started again when the policy had gone on: it has weights that nobody samples with yet."""


class EnginePool:
    """Shares out requests over engines. Used as `async with EnginePool(engines) as pool`.

    An engine that dies is started again, with the weights that the others have, up to `max_restarts` times; meanwhile
    the others do what it had to do. As the tokens follow from each request's own seed, nobody notices. Who is cancelled
    while waiting for a completion has it forgotten; nothing else is ever lost.
    """

    def __init__(
        self,
        engines: Sequence[Actor],
        max_batch_size: int,
        *,
        continuous: bool = False,
        max_restarts: int = 0,
        stall_seconds: float | None = None,
        stop_token_ids: Sequence[int] = (),
        min_new_tokens: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        """`continuous` engines take up to `max_batch_size` requests at any time, others only when they have none.

        One that has finished nothing for `stall_seconds` counts as dead; a request that one which goes on finishing
        others has had for as long is asked of another, a few times. `stop_token_ids` and `min_new_tokens` are
        those of every request.
        """
        self._slots = [_Slot(number, engine) for number, engine in enumerate(engines)]
        self._max_batch_size = max_batch_size
        self._continuous = continuous
        self._max_restarts = max_restarts
        self._stall_seconds = stall_seconds
        self._stop_token_ids = tuple(stop_token_ids)
        self._min_new_tokens = min_new_tokens
        self._say = say
        self._waiting: deque[_Asked] = deque()
        self._tickets = count()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._transfer: WeightTransfer | None = None
        self._lies_still = asyncio.Event()
        self._lies_still.set()
        self._busy_seconds = 0.0
        self._failure: Exception | None = None

    @property
    def restarts(self) -> int:
        """How many engines have been started again so far."""
        return sum(slot.restarts for slot in self._slots)

    def busy_seconds(self) -> float:
        """How long engines have had something to do so far: a mean over them."""
        now = time.perf_counter()
        running = sum(now - slot.busy_since for slot in self._slots if slot.busy_since is not None)
        return (self._busy_seconds + running) / len(self._slots)

    async def __aenter__(self) -> EnginePool:
        self._spawn(self._share_out())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def start(self) -> None:
        """Wait until all engines are there. Failure where one cannot be made."""
        await self._all("start")

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """One completion. Failure where an engine raised; NodeFailure where one died, once too often."""
        if self._failure is not None:
            raise self._failure
        future = asyncio.get_running_loop().create_future()
        sampling = replace(sampling, stop_token_ids=self._stop_token_ids, min_new_tokens=self._min_new_tokens)
        request = Request(tuple(prompt_ids), sampling)
        asked = _Asked(next(self._tickets), request, future)
        self._waiting.append(asked)
        self._changed.set()
        try:
            completion: Completion = await future
        finally:
            if future.cancelled():
                self._forget(asked)
        return completion

    def _forget(self, asked: _Asked) -> None:
        if (slot := asked.slot) is None:
            with suppress(ValueError):
                self._waiting.remove(asked)
        elif slot.in_flight.pop(asked.ticket, None) is not None:
            self._abort(slot, asked.ticket)

    def _abort(self, slot: _Slot, ticket: int) -> None:
        slot.aborting.append(ticket)
        if len(slot.aborting) == 1:
            self._spawn(self._send_aborted(slot))

    async def _send_aborted(self, slot: _Slot) -> None:
        restarts = slot.restarts
        tickets, slot.aborting = slot.aborting, []
        if slot.restarting is not None:
            return
        try:
            await slot.engine.call("abort", tickets)
        except Exception as error:
            self._fail(slot, restarts, error)

    async def load(self, transfer: WeightTransfer) -> None:
        """Bring all engines the policy's weights, in the place of the last ones: first whoever is still reading those
        ends."""
        while restarting := [slot.restarting for slot in self._slots if slot.restarting is not None]:
            await asyncio.gather(*restarting)
        self._lies_still.clear()
        try:
            await transfer.prepare()
            self._transfer = transfer
        finally:
            self._lies_still.set()
        await together(*(self._deliver(transfer, party) for party in transfer.parties()))
        self._changed.set()

    async def sleep(self) -> None:
        """Have all engines give up their GPUs' memory, once what they have is finished."""
        await self._all("sleep")

    async def wake(self, what: str) -> None:
        """Have a part of it back: `weights`, then `kv_cache`, after which they sample again."""
        await self._all("wake", what)

    async def _all(self, method: str, *arguments: str) -> None:
        calls = (partial(slot.engine.call, method, *arguments) for slot in self._slots)
        await together(*map(self._or_restart, self._slots, calls))

    async def _deliver(self, transfer: WeightTransfer, party: Sequence[int]) -> None:
        slots = [self._slots[number] for number in party]

        async def send() -> None:
            await transfer.send(party)
            for slot in slots:
                slot.is_ahead = False

        # Of several that are served together it is not known who has got how far.
        await (self._or_restart(slots[0], send) if len(slots) == 1 else send())

    async def _or_restart(self, slot: _Slot, do: Callable[[], Awaitable[object]]) -> None:
        """Where the engine dies of it, the one that takes its place has done as much once it is there."""
        if slot.restarting is not None:
            await slot.restarting
        try:
            await do()
        except PolicyLost:
            raise
        except NodeFailure as error:
            self._fail(slot, slot.restarts, error)
            if slot.restarting is not None:
                await slot.restarting
        if self._failure is not None:
            raise self._failure

    async def _share_out(self) -> None:
        """Keep all engines equally busy.

        Consumes waiting requests. Waits for: a request, or an engine that has become free. Produces work for engines.
        Unblocked by: `generate`, `_work`, `_restart`.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            there = [slot for slot in self._slots if slot.restarting is None and not slot.is_ahead]
            free = [slot for slot in there if slot.worker is None or self._continuous]
            # The busiest first: what it has too much of, the others have to have less of.
            free.sort(key=lambda slot: len(slot.in_flight), reverse=True)
            while self._waiting and free:
                level = math.ceil((len(self._waiting) + sum(len(slot.in_flight) for slot in free)) / len(free))
                slot = free.pop(0)
                room = min(level, self._max_batch_size) - len(slot.in_flight)
                batch = self._take(slot, room, is_alone=len(there) == 1)
                if batch:
                    slot.in_flight |= {asked.ticket: asked for asked in batch}
                    self._spawn(self._submit(slot, {asked.ticket: asked.request for asked in batch}))
                    if slot.worker is None:
                        slot.worker = self._spawn(self._work(slot))

    def _take(self, slot: _Slot, room: int, *, is_alone: bool) -> list[_Asked]:
        """The first of those who wait, except, where there are other engines, for what got nowhere on this one."""
        taken, left, now = list[_Asked](), list[_Asked](), time.perf_counter()
        while self._waiting and len(taken) < room:
            asked = self._waiting.popleft()
            if asked.tried and asked.tried[-1] is slot and not is_alone:
                left.append(asked)
            else:
                asked.slot, asked.since = slot, now
                taken.append(asked)
        self._waiting.extendleft(reversed(left))
        return taken

    async def _submit(self, slot: _Slot, requests: Mapping[int, Request]) -> None:
        restarts = slot.restarts
        try:
            await slot.engine.call("submit", requests)
        except Exception as error:
            self._fail(slot, restarts, error)

    async def _work(self, slot: _Slot) -> None:
        """Pass on what an engine finishes for as long as it has something to do."""
        restarts = slot.restarts
        slot.busy_since = since = time.perf_counter()
        try:
            while slot.in_flight:
                finished = await self._collect(slot.engine)
                if slot.restarts > restarts:
                    return  # what the engine before this one had is somebody else's by now
                for ticket, completion in finished.items():
                    asked = slot.in_flight.pop(ticket, None)  # none where it is forgotten
                    if asked is not None and not asked.future.done():
                        asked.future.set_result(completion)
                if finished:
                    self._ask_elsewhere(slot)
                self._changed.set()
        except Exception as error:
            self._fail(slot, restarts, error)
        finally:
            self._busy_seconds += time.perf_counter() - since
            if slot.worker is asyncio.current_task():
                slot.worker = slot.busy_since = None

    def _ask_elsewhere(self, slot: _Slot) -> None:
        """Of an engine that has just finished something, ask another what this one should have finished long ago."""
        latest = time.perf_counter() - (math.inf if self._stall_seconds is None else self._stall_seconds)
        for asked in [each for each in slot.in_flight.values() if each.since < latest]:
            asked.tried.append(slot)
            if len(asked.tried) == _MAX_TRIES:
                tried = ", ".join(each.engine.name for each in asked.tried)
                raise Failure(
                    f"a request with {len(asked.request.prompt_ids)} prompt tokens and seed "
                    f"{asked.request.sampling.seed} got nowhere on {tried}, each time for {self._stall_seconds:g} s "
                    "while others were finished (policy.generation.stall_timeout_seconds): is that more than the "
                    "longest completion takes?"
                )
            self._say(f"{slot.engine.name} has got nowhere with a request for {self._stall_seconds:g} s: asked anew")
            del slot.in_flight[asked.ticket]
            self._abort(slot, asked.ticket)
            # Under another ticket, as the engine may answer to this one yet.
            asked.ticket, asked.slot = next(self._tickets), None
            self._waiting.appendleft(asked)

    async def _collect(self, engine: Actor) -> Mapping[int, Completion]:
        finished: Mapping[int, Completion]
        try:
            async with asyncio.timeout(self._stall_seconds):
                finished = await engine.call("collect")
        except TimeoutError:
            raise NodeFailure(
                f"{engine.name} has finished nothing for {self._stall_seconds:g} s "
                "(policy.generation.stall_timeout_seconds)"
            ) from None
        return finished

    def _fail(self, slot: _Slot, restarts: int, error: Exception) -> None:
        """An engine that had been started again so often is gone, or has raised."""
        if slot.restarts > restarts or slot.restarting is not None:
            return  # another call of the same engine has said so
        for asked in slot.in_flight.values():
            asked.slot = None
        self._waiting.extendleft(reversed(slot.in_flight.values()))
        slot.in_flight.clear()
        slot.aborting.clear()
        slot.worker = slot.busy_since = None
        if isinstance(error, NodeFailure) and slot.engine.make is not None and slot.restarts < self._max_restarts:
            slot.restarting = self._spawn(self._restart(slot, error))
        else:
            self._end(error)

    async def _restart(self, slot: _Slot, error: Exception) -> None:
        """Another engine in the place of one that died; all that wait learn of it where there can be none."""
        while slot.restarts < self._max_restarts:
            slot.restarts += 1
            self._say(f"{error}: started again, for the {slot.restarts}. time of {self._max_restarts}")
            try:
                slot.engine.restart()
                await self._lies_still.wait()
                await slot.engine.call_while_placed("start", every=_ALIVE_SECONDS)
                if self._transfer is not None:
                    slot.is_ahead = not await self._transfer.send([slot.number])
            except NodeFailure as another:
                error = another
            except Exception as other:
                error = other
                break
            else:
                slot.restarting = None
                self._changed.set()
                return
        slot.restarting = None
        self._end(error)

    def _end(self, error: Exception) -> None:
        self._failure = error
        waiting = [*self._waiting, *(asked for slot in self._slots for asked in slot.in_flight.values())]
        for asked in waiting:
            if not asked.future.done():
                asked.future.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
