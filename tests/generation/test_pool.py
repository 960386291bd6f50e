"""Requests shared out over engines. The engines here are coroutines; real ones run in tests/grpo."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from groups import completion

from slurmkit.errors import Failure
from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.generation.pool import EnginePool

SAMPLING = SamplingParams(1.0, 4, seed=0)


class Recorder:
    """Answers with the prompt, and remembers how many it was given at once; fails what it is given first, if asked."""

    name = "engine 0"

    def __init__(self, failures: int = 0) -> None:
        self.batches: list[int] = []
        self._failures = failures
        self._submitted: dict[int, Request] = {}

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "submit":
            assert not self._submitted, "given more while it had something to do"
            self.batches.append(len(arguments[0]))
            self._submitted = dict(arguments[0])
            return None
        assert method == "collect"
        await asyncio.sleep(0.001)
        submitted, self._submitted = self._submitted, {}
        if self._failures:
            self._failures -= 1
            raise Failure("engine 0 died")
        return {ticket: echo(request) for ticket, request in submitted.items()}


class Continuous:
    """Answers what has been submitted one by one, each after a while; may be given more at any time."""

    name = "engine 0"

    def __init__(self, seconds: float) -> None:
        self.most = self.answered = 0
        self._seconds = seconds
        self._submitted: dict[int, Request] = {}

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "submit":
            self._submitted |= arguments[0]
            self.most = max(self.most, len(self._submitted))
            return None
        await asyncio.sleep(self._seconds)
        ticket = next(iter(self._submitted))
        self.answered += 1
        return {ticket: echo(self._submitted.pop(ticket))}


def echo(request: Request) -> Completion:
    return completion(request.prompt_ids, (0.0,) * len(request.prompt_ids))


async def ask(engines: list[Any], count: int, max_batch_size: int, *, continuous: bool = False) -> list[Any]:
    async with EnginePool(engines, max_batch_size, continuous=continuous) as pool:
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


def test_an_engine_that_takes_more_at_any_time_is_kept_full_and_a_quick_one_does_more() -> None:
    slow, quick = Continuous(0.02), Continuous(0.001)
    answers = asyncio.run(asyncio.wait_for(ask([slow, quick], 100, 8, continuous=True), 20))
    assert [answer.token_ids.tolist() for answer in answers] == [[number] for number in range(100)]
    assert (slow.most, quick.most) == (8, 8)
    assert quick.answered > 3 * slow.answered


def test_engines_that_take_more_at_any_time_get_equally_much_of_little() -> None:
    engines = [Continuous(0.001) for _ in range(4)]
    asyncio.run(asyncio.wait_for(ask(engines, 10, 8, continuous=True), 20))
    assert sorted(engine.most for engine in engines) == [2, 2, 3, 3]


def test_a_failure_reaches_those_who_asked_and_nobody_waits_for_ever() -> None:
    answers = asyncio.run(asyncio.wait_for(ask([Recorder(failures=1)], 10, 4), 10))
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    assert len(failed) == 4
    assert len(answers) - len(failed) == 6


def test_a_completion_without_as_many_logprobs_as_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1 logprobs"):
        completion((1, 2), (0.0,))
