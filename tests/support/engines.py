"""Both engines, called as the same plain functions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from slurmkit.generation.engine import Completion, Request
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.generation.vllm_engine import VllmEngine
from slurmkit.generation.weights import Weights
from tests.support.requirements import unchanged_environment


class Torch:
    """The embedded engine."""

    def __init__(self, model_path: Path, **settings: Any) -> None:
        self._engine = TorchEngine(str(model_path), **settings)

    def load(self, weights: Weights) -> None:
        self._engine.load(weights)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self._engine.submit(dict(enumerate(requests)))
        finished = self._engine.collect()
        return [finished[ticket] for ticket in range(len(requests))]

    def generate_but(self, aborted: int, requests: Sequence[Request]) -> list[Completion]:
        """As if one of them had not been asked for."""
        self._engine.submit(dict(enumerate(requests)))
        self._engine.abort([aborted])
        finished = self._engine.collect()
        return [finished[ticket] for ticket in sorted(finished)]

    def end(self) -> None:
        pass


class Vllm:
    """vLLM, in an event loop of its own, as Ray gives it one."""

    def __init__(self, model_path: Path, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._tickets = 0
        self.engine = self.do(self._make(model_path, settings))

    async def _make(self, model_path: Path, settings: dict[str, Any]) -> VllmEngine:
        with unchanged_environment():
            return VllmEngine(str(model_path), threads=1, **settings)

    def do(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(120)

    def load(self, weights: Weights) -> None:
        self.do(self.engine.load(weights))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        finished: dict[int, Completion] = {}
        tickets = range(self._tickets, self._tickets + len(requests))
        self._tickets = tickets.stop

        async def ask() -> None:
            await self.engine.submit(dict(zip(tickets, requests, strict=True)))
            while len(finished) < len(requests):
                finished.update(await self.engine.collect())

        self.do(ask())
        return [finished[ticket] for ticket in tickets]

    def generate_but(self, aborted: int, requests: Sequence[Request]) -> list[Completion]:
        finished: dict[int, Completion] = {}

        async def ask() -> None:
            await self.engine.submit(dict(enumerate(requests, self._tickets)))
            await self.engine.abort([self._tickets + aborted])
            while len(finished) < len(requests) - 1:
                finished.update(await self.engine.collect())

        self.do(ask())
        self._tickets += len(requests)
        return [finished[ticket] for ticket in sorted(finished)]

    def end(self) -> None:
        self.engine._llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
