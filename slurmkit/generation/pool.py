"""All engines behind one coroutine: an episode asks for a completion and does not know who else asks, or where."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from slurmkit.generation.actors import Actor, together
from slurmkit.generation.engine import Completion, Request, SamplingParams

_Waiting = tuple[Request, asyncio.Future[Completion]]


class EnginePool:
    """Shares out requests over engines. Used as `async with EnginePool(engines) as pool`."""

    def __init__(self, engines: Sequence[Actor], max_batch_size: int) -> None:
        self._engines = engines
        self._max_batch_size = max_batch_size
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._idle = 0
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> EnginePool:
        self._loops = [asyncio.create_task(self._serve(engine)) for engine in self._engines]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """One completion. Failure where the engine that had the request died or overran its deadline."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((Request(tuple(prompt_ids), sampling), future))
        self._arrived.set()
        completion: Completion = await future
        return completion

    async def load(self, weights: object) -> None:
        """Give every engine new weights: a Ray reference to a `Weights`, which the driver never fetches."""
        await together(*(engine.call("load", weights) for engine in self._engines))

    async def _serve(self, engine: Actor) -> None:
        """Keep one engine busy.

        Consumes: waiting requests, its share of what the idle engines find. Waits for: a request, then the engine's
        answer. Produces: completions, or the engine's failure, for the coroutines that asked. Unblocked by: `generate`.
        """
        while True:
            self._idle += 1
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            share = math.ceil(len(self._waiting) / self._idle)
            self._idle -= 1
            batch = [self._waiting.popleft() for _ in range(min(share, self._max_batch_size))]
            try:
                completions = await engine.call("generate", [request for request, _ in batch])
                for (_, future), completion in zip(batch, completions, strict=True):
                    if not future.done():
                        future.set_result(completion)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
