"""Groups to samples: who counts, and what is said about those who do not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tiny import make_tiny_model

from slurmkit.config.data import ArithmeticEnv
from slurmkit.envs.arithmetic import Arithmetic
from slurmkit.envs.environment import Environment, Message, Score, Task
from slurmkit.errors import Failure
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.grpo.credit import credit
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Group, Sampling, collect


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(make_tiny_model(tmp_path_factory.mktemp("chat") / "model"))


class Scripted:
    """An engine that gives one reply after the other."""

    def __init__(self, chat: Chat, replies: Sequence[str | None]) -> None:
        self._chat, self._replies = chat, list(replies)

    async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        reply = self._replies.pop(0)
        if reply is None:
            return Completion((), (), "prompt_too_long", 3)
        ids = self._chat.reply_ids(reply)
        return Completion(ids, (-0.5,) * len(ids), "stop", 3)


class Breaking(Arithmetic):
    """Environments of which every third raises, or hangs, when it is asked to judge."""

    def __init__(self, hang: bool = False) -> None:
        super().__init__(ArithmeticEnv(), seed=1)
        self._hang, self._made = hang, 0

    def environment(self) -> Environment:  # type: ignore[override]
        environment = super().environment()
        self._made += 1
        if self._made % 3 == 0:
            environment.score = self._fail  # type: ignore[method-assign]
        return environment

    async def _fail(self) -> Score:
        if self._hang:
            await asyncio.sleep(3600)
        raise ConnectionError("the judge is gone")


TASK = Task("1+1+1", "1+1+1=", "3")


def play(chat: Chat, domain: Arithmetic, replies: Sequence[str | None], tasks: int = 1) -> list[Group]:
    return asyncio.run(
        collect(
            [TASK] * tasks,
            episodes_per_task=len(replies) // tasks,
            domain=domain,
            policy=Scripted(chat, replies),
            chat=chat,
            sampling=Sampling(1.0, 5, (1,)),
            environment_timeout_seconds=0.2,
        )
    )


def test_a_sample_is_the_templates_prompt_and_the_sampled_tokens(chat: Chat) -> None:
    groups = play(chat, Arithmetic(ArithmeticEnv(), 1), ["3", "4"])
    samples, _ = credit(groups, normalize=False, leave_one_out=True)
    prompt = chat.prompt_ids([Message("user", "1+1+1=")])
    assert samples[0].token_ids == prompt + chat.reply_ids("3")
    assert samples[0].loss_mask == (0,) * len(prompt) + (1, 1)
    assert samples[0].logprobs == (0.0,) * len(prompt) + (-0.5, -0.5)
    assert samples[0].advantage == (0.0,) * len(prompt) + (1.0, 1.0)
    assert samples[1].advantage[-1] == -1.0
    assert samples[0].weight_version == 3


@pytest.mark.parametrize("hang", [False, True])
def test_an_episode_whose_environment_fails_is_counted_and_no_zero(chat: Chat, hang: bool) -> None:
    # The third is broken, so right and wrong among the other three: means over 3, not over 4.
    groups = play(chat, Breaking(hang), ["3", "3", "3", "4"])
    samples, metrics = credit(groups, normalize=False, leave_one_out=False)
    assert metrics["train:broken_episodes"] == 1
    assert metrics["train:reward_mean"] == pytest.approx(2 / 3)
    assert [sample.advantage[-1] for sample in samples] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    assert ("TimeoutError" if hang else "the judge is gone") in groups[0].broken[0]


def test_groups_without_signal_are_counted_by_reason(chat: Chat) -> None:
    groups = play(chat, Arithmetic(ArithmeticEnv(), 1), ["3", "3", "4", "5", None, "3", "3", "4"], tasks=4)
    samples, metrics = credit(groups, normalize=True, leave_one_out=False)
    assert metrics["train:groups_with_signal"] == 1
    assert metrics["train:dropped_groups/all_correct"] == 1
    assert metrics["train:dropped_groups/none_correct"] == 1
    assert metrics["train:dropped_groups/too_few_episodes"] == 1
    assert metrics["train:prompts_too_long"] == 1
    assert len(samples) == 7


def test_a_failing_engine_is_not_taken_for_a_broken_environment(chat: Chat) -> None:
    class Dead(Scripted):
        async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
            raise Failure("engine 0 died")

    with pytest.raises(Failure, match="engine 0 died"):
        asyncio.run(
            collect(
                [TASK],
                episodes_per_task=2,
                domain=Arithmetic(ArithmeticEnv(), 1),
                policy=Dead(chat, []),
                chat=chat,
                sampling=Sampling(1.0, 5, (1,)),
                environment_timeout_seconds=1.0,
            )
        )


def test_every_episode_of_a_step_and_every_step_draws_other_random_numbers() -> None:
    seeds = {Sampling(1.0, 5, (1, 0, step)).of_episode(index).seed for step in range(20) for index in range(20)}
    assert len(seeds) == 400
