"""Rollouts that begin before their step: how early, with which tasks, how old, and what becomes of them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from slurmkit.config.algorithm import Grpo
from slurmkit.envs.environment import Task, TaskSource
from slurmkit.envs.tasks import TaskOrder
from slurmkit.errors import Failure
from slurmkit.grpo.ahead import Rollouts
from slurmkit.grpo.interrupt import SIGNALS, Interrupts
from slurmkit.grpo.trainer import Trainer
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode
from tests.support.groups import completion, conversation, group, of

TASKS = [Task(str(number), f"{number}?", str(number)) for number in range(100)]


class Players:
    """Plays groups once they are let go on, and remembers which step asked for which tasks, in order."""

    def __init__(self, *, let_go: bool = False) -> None:
        self.asked: list[tuple[int, list[str]]] = []
        self.cancelled: list[int] = []
        self._let_go = let_go
        self._gates: dict[int, asyncio.Event] = {}

    def let(self, step: int) -> None:
        self._gate(step).set()

    async def play(self, step: int, tasks: Sequence[Task], before: int) -> list[Group]:
        self.asked.append((step, [task.name for task in tasks]))
        try:
            await (asyncio.sleep(0) if self._let_go else self._gate(step).wait())
        except asyncio.CancelledError:
            self.cancelled.append(step)
            raise
        # A task teaches something unless its number can be divided by three.
        return [group(1.0, float(int(task.name) % 3 == 0), name=task.name) for task in tasks]

    def _gate(self, step: int) -> asyncio.Event:
        return self._gates.setdefault(step, asyncio.Event())


def with_rollouts(
    work: Callable[[Rollouts, Any], Awaitable[None]],
    players: Any,
    age: int,
    *,
    last_step: int = 50,
    num_tasks: int = 1000,
    position: int = 0,
    **grpo: Any,
) -> None:
    config = Grpo(
        num_prompts_per_step=2,
        num_generations_per_prompt=2,
        async_grpo={"enabled": age > 0, "max_trajectory_age_steps": age},
        **grpo,
    )
    order = TaskOrder([TaskSource(TASKS, 1)], seed=0, shuffle=False, position=position)

    async def inside() -> None:
        async with Rollouts(players.play, order, config, last_step=last_step, num_tasks=num_tasks) as rollouts:
            await work(rollouts, players)

    asyncio.run(asyncio.wait_for(inside(), 20))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("age", [0, 1, 3])
def test_rollouts_begin_at_most_the_maximum_age_in_steps_early(age: int) -> None:
    async def work(rollouts: Rollouts, players: Players) -> None:
        for step in range(1, 6):
            asked = asyncio.ensure_future(rollouts.of(step, step - 1))
            await settled()
            assert [begun for begun, _ in players.asked] == list(range(1, step + age + 1))
            players.let(step)
            await asked
            await settled()
            assert len(players.asked) == step + age, "nothing begins before the next weights are there"

    with_rollouts(work, Players(), age)


@pytest.mark.parametrize("age", [0, 2])
def test_after_a_resume_no_more_is_begun_than_ever(age: int) -> None:
    async def work(rollouts: Rollouts, players: Players) -> None:
        asked = asyncio.ensure_future(rollouts.of(11, 10))
        await settled()
        assert [begun for begun, _ in players.asked] == list(range(11, 12 + age))
        players.let(11)
        assert [each.task.name for each in (await asked).kept] == ["20", "21"]

    with_rollouts(work, Players(), age, position=20)


@pytest.mark.parametrize("dynamic", [False, True])
def test_async_steps_have_the_tasks_and_positions_of_synchronous_steps(
    dynamic: bool,
) -> None:
    """Of a run that stops here, the next attempt draws again what nobody has trained on."""
    found: dict[int, list[Any]] = {0: [], 2: []}

    for age, steps in found.items():

        async def work(rollouts: Rollouts, players: Players, steps: list[Any] = steps) -> None:
            for step in range(1, 8):
                selection = await rollouts.of(step, step - 1)
                await settled()
                steps.append(([each.task.name for each in selection.kept], selection.dropped, rollouts.position))

        with_rollouts(work, Players(let_go=True), age, use_dynamic_sampling=dynamic)
    assert found[2] == found[0]
    assert found[0][6][2] == (14 if not dynamic else 22)
    assert [name for names, _, _ in found[0] for name in names][:4] == (list("0123") if not dynamic else list("1245"))


def test_rollouts_that_finish_first_wait_for_their_turn() -> None:
    async def work(rollouts: Rollouts, players: Players) -> None:
        asked = asyncio.ensure_future(rollouts.of(1, 0))
        await settled()
        players.let(2)
        await settled()
        assert not asked.done()
        players.let(1)
        assert [each.task.name for each in (await asked).kept] == ["0", "1"]
        assert [each.task.name for each in (await rollouts.of(2, 1)).kept] == ["2", "3"]

    with_rollouts(work, Players(), age=1)


def test_nothing_begins_after_the_last_step_or_without_tasks() -> None:
    async def work(rollouts: Rollouts, players: Players) -> None:
        for step in (1, 2, 3):
            assert not rollouts.are_used_up
            await rollouts.of(step, step - 1)
        assert [begun for begun, _ in players.asked] == [1, 2, 3]

    with_rollouts(work, Players(let_go=True), age=5, last_step=3)

    async def work_to_the_end(rollouts: Rollouts, players: Players) -> None:
        await work(rollouts, players)
        assert rollouts.are_used_up

    with_rollouts(work_to_the_end, Players(let_go=True), age=5, num_tasks=7)


def test_a_failure_reaches_the_step_whose_rollout_failed() -> None:
    class Fails(Players):
        async def play(self, step: int, tasks: Sequence[Task], before: int) -> list[Group]:
            if step == 2:
                raise Failure("of step 2")
            return await super().play(step, tasks, before)

    async def work(rollouts: Rollouts, players: Players) -> None:
        await rollouts.of(1, 0)
        with pytest.raises(Failure, match="of step 2"):
            await rollouts.of(2, 1)

    with_rollouts(work, Fails(let_go=True), age=3)


def test_who_leaves_ends_all_rollouts_and_who_stops_waiting_none() -> None:
    players = Players()

    async def work(rollouts: Rollouts, players: Players) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rollouts.of(1, 0), 0.01)
        assert players.cancelled == []

    with_rollouts(work, players, age=2)
    assert players.cancelled == [1, 2, 3]


def aged(*versions: int) -> Episode:
    """Of two replies, the first of one token."""
    parts = [each for each in (versions[:1], versions[1:]) if each]
    return conversation(1.0, *(completion((7,) * len(each), (-0.5,) * len(each), versions=each) for each in parts))


def test_ages_count_steps_since_the_weights_of_each_token() -> None:
    async def work(rollouts: Rollouts, players: Players) -> None:
        for step, version in ((1, 0), (2, 2), (3, 4), (4, 4)):  # two updates a step, none in the third
            await rollouts.of(step, version)
        assert rollouts.ages([of(aged(4, 4)), of(aged(4))], 4) == {"train:age_mean": 0, "train:age_max": 0}
        assert rollouts.ages([of(aged(0, 2, 2, 4)), of(aged(4, 4))], 4) == {
            "train:age_mean": pytest.approx(numpy.mean([3, 2, 2, 0, 0, 0])),
            "train:age_max": 3,
        }
        assert rollouts.ages([of(aged())], 4) == {}

    with_rollouts(work, Players(let_go=True), age=3)


@pytest.mark.parametrize("age", [0, 2])
def test_an_interrupt_does_not_wait_for_completions_that_block_new_weights(age: int) -> None:
    async def load() -> None:
        await asyncio.sleep(0.1 if not age else 1000)

    async def give() -> bool:
        interrupts = Interrupts()
        interrupts.attend()
        asyncio.get_running_loop().call_later(0.02, signal.raise_signal, signal.SIGUSR2)
        grpo = Grpo(async_grpo={"enabled": True, "max_trajectory_age_steps": age})
        parts: Any = SimpleNamespace(
            turns=SimpleNamespace(of_engines=load),
            config=SimpleNamespace(grpo=grpo),
            interrupts=interrupts,
        )
        return await Trainer.give_weights(parts)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert asyncio.run(asyncio.wait_for(give(), 20)) == (age == 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
