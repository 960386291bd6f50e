"""Requests shared out over engines. The engines here are coroutines; real ones run in tests/grpo."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from slurmkit.errors import Failure, NodeFailure
from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.generation.pool import EnginePool
from tests.support.groups import completion

SAMPLING = SamplingParams(1.0, 4, seed=0)


class Recorder:
    """Answers with the prompt, and remembers how many it was given at once; fails what it is given first, if asked."""

    name = "engine 0"
    make = None

    def __init__(self, failures: int = 0, error: Exception | None = None) -> None:
        self.batches: list[int] = []
        self._failures = failures
        self._error = error or Failure("engine 0 raised")
        self._submitted: dict[int, Request] = {}

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "start":
            return None
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
            raise self._error
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


def test_every_request_has_the_ends_that_the_run_asks_for() -> None:
    asked = list[SamplingParams]()

    class Keeps(Recorder):
        async def call(self, method: str, *arguments: Any) -> Any:
            if method == "submit":
                asked.extend(request.sampling for request in arguments[0].values())
            return await super().call(method, *arguments)

    async def work() -> None:
        async with EnginePool([Keeps()], 4, stop_token_ids=(5, 6), min_new_tokens=2) as pool:  # type: ignore[list-item]
            await pool.generate((1,), SAMPLING)

    asyncio.run(asyncio.wait_for(work(), 10))
    assert asked == [replace(SAMPLING, stop_token_ids=(5, 6), min_new_tokens=2)]


def test_what_waits_is_shared_evenly_between_idle_engines() -> None:
    engines = [Recorder(), Recorder(), Recorder(), Recorder()]
    asyncio.run(asyncio.wait_for(ask(engines, 64, 100), 10))
    assert [engine.batches for engine in engines] == [[16], [16], [16], [16]]


def test_an_engine_is_never_asked_for_more_than_a_batch() -> None:
    engine = Recorder()
    asyncio.run(asyncio.wait_for(ask([engine], 50, 20), 10))
    assert max(engine.batches) <= 20
    assert sum(engine.batches) == 50


def test_a_continuous_engine_stays_full_and_a_faster_one_does_more() -> None:
    slow, quick = Continuous(0.02), Continuous(0.001)
    answers = asyncio.run(asyncio.wait_for(ask([slow, quick], 100, 8, continuous=True), 20))
    assert [answer.token_ids.tolist() for answer in answers] == [[number] for number in range(100)]
    assert (slow.most, quick.most) == (8, 8)
    assert quick.answered > slow.answered


def test_engines_that_take_more_at_any_time_get_equally_much_of_little() -> None:
    engines = [Continuous(0.001) for _ in range(4)]
    asyncio.run(asyncio.wait_for(ask(engines, 10, 8, continuous=True), 20))
    assert sorted(engine.most for engine in engines) == [2, 2, 3, 3]


def test_a_failure_reaches_all_who_wait_and_who_asks_afterwards() -> None:
    async def ask_twice() -> tuple[list[Any], Any]:
        async with EnginePool([Recorder(failures=1)], 4, max_restarts=3) as pool:  # type: ignore[list-item]
            asked = (pool.generate((number,), SAMPLING) for number in range(10))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            return answers, (await asyncio.gather(pool.generate((1,), SAMPLING), return_exceptions=True))[0]

    answers, late = asyncio.run(asyncio.wait_for(ask_twice(), 10))
    assert len(answers) == 10
    assert all(isinstance(answer, Failure) for answer in [*answers, late])


class Mortal(Recorder):
    """Dies `failures` times in the middle of what it was given; where it was started again, says with which weights."""

    def __init__(self, failures: int = 0, *, dies_loading: bool = False) -> None:
        super().__init__(failures, NodeFailure("engine 0 died"))
        self.loaded: list[object] = []
        self.restarted = 0
        self._dies_loading = dies_loading

    def make(self) -> None:  # type: ignore[override] # that there is one is all that is asked
        """Never called: `restart` is this class's own."""

    def restart(self) -> None:
        self.restarted += 1
        self._submitted = {}

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "load":
            if self._dies_loading:
                self._dies_loading = False
                raise NodeFailure("engine 0 died loading")
            self.loaded.append(arguments[0])
            return None
        return await super().call(method, *arguments)

    async def call_while_placed(self, method: str, *arguments: Any, every: float) -> Any:
        await asyncio.sleep(0.01)
        return await self.call(method, *arguments)


def test_requests_of_a_dead_engine_complete_on_others_and_its_replacement() -> None:
    mortal, other, said = Mortal(failures=2), Recorder(), list[str]()

    async def work() -> tuple[list[Completion], int]:
        pool = EnginePool([mortal, other], 4, max_restarts=2, say=said.append)  # type: ignore[list-item]
        async with pool:
            await pool.load(Brings([mortal, other], weights))  # type: ignore[arg-type]
            return await asyncio.gather(*(pool.generate((number,), SAMPLING) for number in range(200))), pool.restarts

    async def weights() -> list[str]:
        return ["its own", "the other's"]

    other.call = serving_loads(other.call)  # type: ignore[method-assign]
    answers, restarts = asyncio.run(asyncio.wait_for(work(), 10))
    assert [answer.token_ids.tolist() for answer in answers] == [[number] for number in range(200)]
    assert (mortal.restarted, restarts) == (2, 2)
    assert mortal.loaded == ["its own"] * 3
    assert said == [f"engine 0 died: started again, for the {count}. time of 2" for count in (1, 2)]


class Brings:
    """Weights of which each engine has its own, one engine after the other."""

    def __init__(self, engines: list[Any], make: Callable[[], Awaitable[list[str]]]) -> None:
        self._engines, self._make = engines, make

    def parties(self) -> list[list[int]]:
        return [[number] for number in range(len(self._engines))]

    async def prepare(self) -> None:
        self._made = await self._make()

    async def send(self, numbers: list[int]) -> bool:
        for number in numbers:
            await self._engines[number].call("load", self._made[number])
        return True


def serving_loads(call: Any) -> Any:
    async def serve(method: str, *arguments: Any) -> Any:
        return None if method == "load" else await call(method, *arguments)

    return serve


def test_an_engine_that_dies_once_too_often_ends_the_run() -> None:
    mortal = Mortal(failures=3)

    async def work() -> list[Any]:
        async with EnginePool([mortal], 4, max_restarts=2, say=lambda line: None) as pool:  # type: ignore[list-item]
            return await asyncio.gather(
                *(pool.generate((number,), SAMPLING) for number in range(9)), return_exceptions=True
            )

    answers = asyncio.run(asyncio.wait_for(work(), 10))
    assert all(isinstance(answer, NodeFailure) for answer in answers)
    assert mortal.restarted == 2


def test_an_engine_that_dies_while_loading_has_the_weights_after_restart() -> None:
    mortal = Mortal(dies_loading=True)

    async def work() -> int:
        transfer: Any = Brings([mortal], weights)
        async with EnginePool([mortal], 4, max_restarts=1, say=lambda line: None) as pool:  # type: ignore[list-item]
            await pool.load(transfer)
            assert mortal.loaded == ["new"]  # not before
            return len((await pool.generate((1, 2), SAMPLING)).token_ids)

    async def weights() -> list[str]:
        return ["new"]

    assert asyncio.run(asyncio.wait_for(work(), 10)) == 2
    assert mortal.restarted == 1


class DiesSubmitting(Mortal):
    """In its first life the second `submit` fails while a `collect` is under way, which ends in the next life."""

    def __init__(self, *, collects: bool) -> None:
        super().__init__()
        self._collects = collects

    async def call(self, method: str, *arguments: Any) -> Any:
        life = self.restarted
        if method == "start":
            return None
        if method == "submit":
            if life == 0 and self._submitted:
                raise NodeFailure("engine 0 died")
            self._submitted |= arguments[0]
            return None
        held = self._submitted
        await asyncio.sleep(0.1 if life else 0.05)
        if life == 0 and not self._collects:
            raise NodeFailure("engine 0 died")
        answers = {ticket: echo(request) for ticket, request in held.items()}
        if life:
            self._submitted = {}
        return answers


@pytest.mark.parametrize("collects", [True, False])
def test_two_calls_that_one_death_ends_are_one_death(collects: bool) -> None:
    engine = DiesSubmitting(collects=collects)

    async def work() -> list[Completion]:
        async with EnginePool([engine], 4, continuous=True, max_restarts=1, say=lambda line: None) as pool:  # type: ignore[list-item]
            first = asyncio.create_task(pool.generate((1,), SAMPLING))
            await asyncio.sleep(0.01)
            return list(await asyncio.gather(first, pool.generate((2,), SAMPLING)))

    answers = asyncio.run(asyncio.wait_for(work(), 10))
    assert [answer.token_ids.tolist() for answer in answers] == [[1], [2]]
    assert engine.restarted == 1


def test_weights_are_not_made_while_an_engine_still_takes_up_the_last_ones() -> None:
    mortal, made = Mortal(failures=1), list[int]()

    async def weights() -> list[str]:
        made.append(len(mortal.loaded))
        return [f"version {len(made)}", ""]

    async def work() -> None:
        other = Recorder()
        other.call = serving_loads(other.call)  # type: ignore[method-assign]
        transfer: Any = Brings([mortal, other], weights)
        async with EnginePool([mortal, other], 4, max_restarts=1, say=lambda line: None) as pool:  # type: ignore[list-item]
            await pool.load(transfer)
            await asyncio.gather(*(pool.generate((number,), SAMPLING) for number in range(4)))
            assert mortal.loaded == ["version 1"], "it is still being started again"
            await pool.load(transfer)

    asyncio.run(asyncio.wait_for(work(), 10))
    assert made == [0, 2]
    assert mortal.loaded == ["version 1", "version 1", "version 2"]


def test_a_restarted_engine_ahead_of_others_samples_after_the_next_load() -> None:
    mortal = Mortal(failures=1)

    async def weights() -> list[str]:
        return ["some"]

    class GoesOn(Brings):
        async def send(self, numbers: list[int]) -> bool:
            await super().send(numbers)
            return mortal.restarted == 0 or len(mortal.loaded) > 2

    async def work() -> None:
        transfer: Any = GoesOn([mortal], weights)
        async with EnginePool([mortal], 4, max_restarts=1, say=lambda line: None) as pool:  # type: ignore[list-item]
            await pool.load(transfer)
            asked = asyncio.ensure_future(pool.generate((1,), SAMPLING))
            await asyncio.sleep(0.1)
            assert (mortal.loaded, len(mortal.batches)) == (["some"] * 2, 1)
            await pool.load(transfer)
            assert (await asked).token_ids.tolist() == [1]

    asyncio.run(asyncio.wait_for(work(), 10))
    assert (mortal.restarted, len(mortal.batches)) == (1, 2)


def test_a_failed_send_to_engines_served_together_ends_the_load() -> None:
    class Fails(Brings):
        def parties(self) -> list[list[int]]:
            return [[0, 1]]

        async def send(self, numbers: list[int]) -> bool:
            raise NodeFailure("engine 1 died, and nobody knows who has got how far")

    async def weights() -> list[str]:
        return ["one", "two"]

    async def work() -> None:
        engines: list[Any] = [Mortal(), Mortal()]
        transfer: Any = Fails(engines, weights)
        async with EnginePool(engines, 4, max_restarts=1, say=lambda line: None) as pool:
            await pool.load(transfer)

    with pytest.raises(NodeFailure, match="nobody knows who has got how far"):
        asyncio.run(asyncio.wait_for(work(), 10))


def test_a_completion_without_as_many_logprobs_as_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1 logprobs"):
        completion((1, 2), (0.0,))


def test_a_restarted_engine_does_not_read_weights_that_are_being_written() -> None:
    mortal, made = Mortal(failures=1), list[str]()

    async def weights() -> list[str]:
        await asyncio.sleep(0.05 if made else 0)
        made.append("some")
        return [f"version {len(made)}"]

    async def work() -> None:
        transfer: Any = Brings([mortal], weights)
        async with EnginePool([mortal], 4, max_restarts=1, say=lambda line: None) as pool:  # type: ignore[list-item]
            await pool.load(transfer)
            answers = asyncio.gather(*(pool.generate((number,), SAMPLING) for number in range(4)))
            await pool.load(transfer)
            assert len(await answers) == 4

    asyncio.run(asyncio.wait_for(work(), 10))
    assert mortal.restarted == 1
    assert mortal.loaded[0] == "version 1"
    assert set(mortal.loaded[1:]) == {"version 2"}, "the first version is being written over"


def test_an_engine_that_dies_before_it_is_there_is_started_again() -> None:
    class DiesStarting(Mortal):
        async def call(self, method: str, *arguments: Any) -> Any:
            if method == "start" and not self.restarted:
                raise NodeFailure("engine 0 died")
            return await super().call(method, *arguments)

    mortal = DiesStarting()

    async def work(max_restarts: int) -> None:
        pool = EnginePool([mortal], 4, max_restarts=max_restarts, say=lambda line: None)  # type: ignore[list-item]
        async with pool:
            await pool.start()
            assert len(await asyncio.gather(*(pool.generate((number,), SAMPLING) for number in range(4)))) == 4

    asyncio.run(asyncio.wait_for(work(1), 10))
    assert mortal.restarted == 1
    mortal.restarted = 0
    with pytest.raises(NodeFailure, match="engine 0 died"):
        asyncio.run(asyncio.wait_for(work(0), 10))


def test_an_engine_that_finishes_nothing_for_too_long_is_started_again() -> None:
    class Hangs(Mortal):
        async def call(self, method: str, *arguments: Any) -> Any:
            if method == "collect" and not self.restarted:
                await asyncio.sleep(1000)
            return await super().call(method, *arguments)

    hanging, said = Hangs(), list[str]()

    async def work() -> list[Completion]:
        pool = EnginePool([hanging], 4, max_restarts=1, stall_seconds=0.1, say=said.append)  # type: ignore[list-item]
        async with pool:
            return list(await asyncio.gather(*(pool.generate((number,), SAMPLING) for number in range(4))))

    assert len(asyncio.run(asyncio.wait_for(work(), 10))) == 4
    assert said == [
        "engine 0 has finished nothing for 0.1 s (policy.generation.stall_timeout_seconds): "
        "started again, for the 1. time of 1"
    ]


class Slow(Mortal):
    """Takes requests at any time and answers each after `seconds`, those of the prompts `stuck` never."""

    def __init__(self, number: int, stuck: set[int], seconds: float = 0.01) -> None:
        super().__init__()
        self.name = f"engine {number}"
        self.stuck, self.aborted, self.asked = stuck, list[int](), list[tuple[int, SamplingParams]]()
        self._seconds = seconds
        self._changed = asyncio.Event()

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "submit":
            self._submitted |= arguments[0]
            self.asked += [(request.prompt_ids[0], request.sampling) for request in arguments[0].values()]
            return None
        if method == "abort":
            self.aborted += [self._submitted.pop(ticket).prompt_ids[0] for ticket in arguments[0]]
            self._changed.set()
            return None
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._seconds)
            answered = [t for t, request in self._submitted.items() if request.prompt_ids[0] not in self.stuck]
            if answered or self._changed.is_set():
                self._changed.clear()
                return {ticket: echo(self._submitted.pop(ticket)) for ticket in answered[:1]}


def test_cancelled_requests_are_aborted_or_never_sent_to_the_engine() -> None:
    engine = Slow(0, stuck={1, 2})

    async def work() -> None:
        async with EnginePool([engine], 2, continuous=True, max_restarts=0) as pool:  # type: ignore[list-item]
            waiting = [asyncio.create_task(pool.generate((number,), SAMPLING)) for number in (1, 2, 3, 4)]
            await asyncio.sleep(0.05)
            for task in waiting[:3]:
                task.cancel()
            assert (await waiting[3]).token_ids.tolist() == [4]
            assert all(task.cancelled() for task in waiting[:3])
            # With nothing in flight, the engine is idle, and takes up work again.
            await asyncio.sleep(0.05)
            before = pool.busy_seconds()
            await asyncio.sleep(0.02)
            assert pool.busy_seconds() == before
            assert (await pool.generate((5,), SAMPLING)).token_ids.tolist() == [5]

    asyncio.run(asyncio.wait_for(work(), 10))
    assert sorted(engine.aborted) == [1, 2]
    assert [prompt for prompt, _ in engine.asked] == [1, 2, 4, 5]


def test_a_stalled_request_is_resent_to_another_engine_with_the_same_seed() -> None:
    engines, said = [Slow(0, {7}), Slow(1, set())], list[str]()

    async def work() -> Completion:
        pool = EnginePool(engines, 4, continuous=True, stall_seconds=0.2, say=said.append)  # type: ignore[arg-type]
        async with pool:
            stuck = asyncio.create_task(pool.generate((7,), replace(SAMPLING, seed=11)))
            while not stuck.done():
                await asyncio.gather(*(pool.generate((number,), SAMPLING) for number in range(20, 24)))
            return await stuck

    assert asyncio.run(asyncio.wait_for(work(), 10)).token_ids.tolist() == [7]
    assert engines[0].aborted == [7]
    assert [(7, replace(SAMPLING, seed=11)) in engine.asked for engine in engines] == [True, True]
    assert said == ["engine 0 has got nowhere with a request for 0.2 s: asked anew"]
    assert [engine.restarted for engine in engines] == [0, 0]


def test_a_request_that_stalls_on_every_engine_ends_the_run_and_names_them() -> None:
    async def work() -> None:
        pool = EnginePool(
            [Slow(0, {7}), Slow(1, {7})],  # type: ignore[list-item]
            4,
            continuous=True,
            stall_seconds=0.1,
            say=lambda line: None,
        )
        async with pool:
            stuck = asyncio.create_task(pool.generate((7, 8), SAMPLING))
            while not stuck.done():
                others = (pool.generate((number,), SAMPLING) for number in range(20, 24))
                await asyncio.gather(*others, return_exceptions=True)
            await stuck

    message = "2 prompt tokens and seed 0 got nowhere on engine 0, engine 1, engine 0, each time for 0.1 s"
    with pytest.raises(Failure, match=message):
        asyncio.run(asyncio.wait_for(work(), 10))


def test_an_engine_without_abort_gets_no_work_until_its_batch_is_finished() -> None:
    engine = Recorder()  # which is not to be given more while it has something to do
    engine.call = forgetting_aborts(engine.call)  # type: ignore[method-assign]

    async def work() -> list[Completion]:
        async with EnginePool([engine], 4) as pool:  # type: ignore[list-item]
            first = asyncio.create_task(pool.generate((1,), SAMPLING))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            first.cancel()
            return list(await asyncio.gather(*(pool.generate((number,), SAMPLING) for number in (2, 3))))

    answers = asyncio.run(asyncio.wait_for(work(), 10))
    assert [answer.token_ids.tolist() for answer in answers] == [[2], [3]]


def forgetting_aborts(call: Any) -> Any:
    async def serve(method: str, *arguments: Any) -> Any:
        return None if method == "abort" else await call(method, *arguments)

    return serve


def test_how_long_engines_had_something_to_do_is_counted() -> None:
    async def work() -> tuple[float, float, float]:
        async with EnginePool([Continuous(0.05), Continuous(0.05)], 4, continuous=True) as pool:  # type: ignore[list-item]
            began = asyncio.get_running_loop().time()
            asked = asyncio.ensure_future(pool.generate((1,), SAMPLING))
            await asyncio.sleep(0.03)
            halfway = pool.busy_seconds()
            await asked
            busy = pool.busy_seconds()
            await asyncio.sleep(0.05)
            assert pool.busy_seconds() == busy, "nobody had anything to do"
            return halfway, busy, asyncio.get_running_loop().time() - began

    halfway, busy, seconds = asyncio.run(asyncio.wait_for(work(), 10))
    assert 0 < halfway < busy < seconds / 2, "one of two"
