"""Requests shared out over engines. The engines here are coroutines; real ones run in tests/grpo."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from groups import completion

from slurmkit.errors import Failure
from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.generation.pool import EnginePool

SAMPLING = SamplingParams(1.0, 4, seed=0)


class Recorder:
    """Answers with the prompt, and remembers how many it was asked at once."""

    def __init__(self, failures: int = 0) -> None:
        self.batches: list[int] = []
        self._failures = failures

    async def call(self, method: str, batch: Sequence[Request]) -> list[Completion]:
        assert method == "generate"
        self.batches.append(len(batch))
        await asyncio.sleep(0.001)
        if self._failures:
            self._failures -= 1
            raise Failure("engine 0 died")
        return [completion(r.prompt_ids, (0.0,) * len(r.prompt_ids)) for r in batch]


async def ask(engines: list[Any], count: int, max_batch_size: int) -> list[Any]:
    async with EnginePool(engines, max_batch_size) as pool:
        return await asyncio.gather(
            *(pool.generate((number,), SAMPLING) for number in range(count)), return_exceptions=True
        )


def test_everybody_gets_the_answer_to_their_own_prompt() -> None:
    answers = asyncio.run(asyncio.wait_for(ask([Recorder(), Recorder()], 50, 8), 10))
    assert [answer.token_ids.tolist() for answer in answers] == [[number] for number in range(50)]


def test_what_waits_is_shared_evenly_between_idle_engines() -> None:
    engines = [Recorder(), Recorder(), Recorder(), Recorder()]
    asyncio.run(asyncio.wait_for(ask(engines, 64, 100), 10))
    assert [engine.batches for engine in engines] == [[16], [16], [16], [16]]


def test_an_engine_is_never_asked_for_more_than_a_batch() -> None:
    engine = Recorder()
    asyncio.run(asyncio.wait_for(ask([engine], 50, 20), 10))
    assert max(engine.batches) <= 20
    assert sum(engine.batches) == 50


def test_a_failure_reaches_those_who_asked_and_nobody_waits_for_ever() -> None:
    answers = asyncio.run(asyncio.wait_for(ask([Recorder(failures=1)], 10, 4), 10))
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    assert len(failed) == 4
    assert len(answers) - len(failed) == 6


def test_a_completion_without_as_many_logprobs_as_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1 logprobs"):
        completion((1, 2), (0.0,))
