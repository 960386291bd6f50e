"""Episodes that the environment spoils, and prompts that leave no room."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from slurmkit.config.data import ArithmeticEnv
from slurmkit.envs.arithmetic import Arithmetic
from slurmkit.envs.environment import Environment, Score, Task
from slurmkit.errors import UserError
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Group, Sampling, collect, refuse_prompts_that_never_fit
from slurmkit.rollout.episode import Limits
from tests.support.groups import completion
from tests.support.tiny_model import make_tiny_model, tiny_config

TASKS = [Task("short", "1+1=", "2"), Task("long", "1" * 100, "2")]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(make_tiny_model(tmp_path_factory.mktemp("chat") / "model"))


class Judged(Arithmetic):
    """Environments that give these rewards, one after the other."""

    def __init__(self, *rewards: float) -> None:
        super().__init__(ArithmeticEnv(), seed=1)
        self._rewards = list(rewards)

    def environment(self) -> Environment:  # type: ignore[override]
        environment, reward = super().environment(), self._rewards.pop(0)

        async def score() -> Score:
            return Score(reward, True)

        environment.score = score  # type: ignore[method-assign]
        return environment


class Engine:
    async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        return completion((50, 257), (-0.5, -0.5), text="a reply")


def test_non_finite_reward_breaks_its_episode_and_the_error_names_the_task(chat: Chat) -> None:
    groups = asyncio.run(
        collect(
            TASKS[:1],
            episodes_per_task=4,
            domain=Judged(1.0, float("nan"), float("inf"), 0.5),
            policy=Engine(),
            chat=chat,
            sampling=Sampling(1.0, 5, (1,)),
            limits=Limits(1, 5.0, None, 100),
        )
    )
    assert [episode.score.reward for episode in groups[0].episodes] == [1.0, 0.5]
    assert groups[0].broken == tuple(
        f"task short: _Episode: score: reward must be a number from -1e+09 to 1e+09, found {each} (float)"
        for each in ("nan", "inf")
    )
    assert [message.role for message in groups[0].episodes[0].messages] == ["user", "assistant"]
    assert groups[0].episodes[0].messages[1].content == "a reply"


def test_environment_may_wait_repeatedly_and_is_cancelled_after_its_limit(chat: Chat) -> None:
    seen: list[str] = []

    class Waiting(Arithmetic):
        def environment(self) -> Environment:  # type: ignore[override]
            environment, score, number = super().environment(), Score(1.0, True), len(seen)

            async def judge() -> Score:
                seen.append("begun")
                try:
                    for _ in range(3):
                        await asyncio.sleep(0.01)
                    try:
                        await asyncio.wait_for(asyncio.Event().wait(), 0.01)
                    except TimeoutError:
                        seen[number] = "its own deadline passed"
                    if number == 1:
                        await asyncio.sleep(60)
                    return score
                except asyncio.CancelledError:
                    seen[number] = "told to end"
                    raise

            environment.score = judge  # type: ignore[method-assign]
            return environment

    def play() -> Group:
        (group,) = asyncio.run(
            collect(
                TASKS[:1],
                episodes_per_task=1,
                domain=Waiting(ArithmeticEnv(), seed=1),
                policy=Engine(),
                chat=chat,
                sampling=Sampling(1.0, 5, (1,)),
                limits=Limits(1, 0.5, None, 100),
            )
        )
        return group

    assert [episode.score.reward for episode in play().episodes] == [1.0]
    assert play().broken == ("task short: _Episode: TimeoutError: ",)
    assert seen == ["its own deadline passed", "told to end"]


def test_a_later_round_of_a_step_draws_numbers_of_its_own() -> None:
    together = [each.seed for each in Sampling(1.0, 5, (1, 0, 3)).of_episodes(12)]
    rounds = [each.seed for first in (0, 8) for each in Sampling(1.0, 5, (1, 0, 3), first).of_episodes(4)]
    assert rounds == together[:4] + together[8:]


def test_tasks_of_which_no_prompt_fits_are_refused_with_the_shortest(chat: Chat, tmp_path: Path) -> None:
    def check(tasks: list[Task], **policy: int) -> None:
        config = tiny_config(tmp_path, policy={**tiny_config(tmp_path).policy.model_dump(), **policy})
        domain = Arithmetic(ArithmeticEnv(), seed=1)
        asyncio.run(refuse_prompts_that_never_fit("training", tasks, domain, chat, config))

    check(TASKS[::-1])
    longer = Task("longer", "1" * 120, "2")
    with pytest.raises(UserError) as refused:
        check([longer, TASKS[1]])
    length = len(chat.prompt_ids(TASKS[1].messages))
    assert str(refused.value) == (
        "policy.max_total_sequence_length 64 has no room for a reply to any of the 2 training tasks: the shortest "
        f"prompt, of long, has {length} tokens"
    )
    with pytest.raises(UserError):
        check([TASKS[1]], max_total_sequence_length=length)
    check([TASKS[1]], max_total_sequence_length=length + 1)
