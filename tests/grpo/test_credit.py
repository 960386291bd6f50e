"""Groups to samples: who counts, and what is said about those who do not."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy
import pytest

from slurmkit.config.algorithm import Grpo, LossFn
from slurmkit.config.data import ArithmeticEnv
from slurmkit.envs.arithmetic import Arithmetic
from slurmkit.envs.environment import Environment, Message, Score, Task
from slurmkit.errors import Failure
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.grpo.batch import loss_weights
from slurmkit.grpo.credit import credit, make_samples
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Group, Sampling, collect
from slurmkit.rollout.episode import Episode, Limits
from slurmkit.rollout.sample import Sample
from tests.support.groups import completion, conversation
from tests.support.tiny_model import make_tiny_model


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
            return completion((), (), "prompt_too_long", text="", versions=3)
        ids = self._chat.reply_ids(reply)
        return completion(ids, (-0.5,) * len(ids), text=reply, versions=range(3, 3 + len(ids)))


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
            limits=Limits(1, 0.2, None, 100),
        )
    )


def judge(groups: Sequence[Group], grpo: Grpo) -> tuple[list[Sample], dict[str, float]]:
    return credit(groups, make_samples(groups), grpo, LossFn())


def test_a_sample_is_the_templates_prompt_and_the_sampled_tokens(chat: Chat) -> None:
    groups = play(chat, Arithmetic(ArithmeticEnv(), 1), ["3", "4"])
    samples, _ = judge(groups, Grpo(normalize_rewards=False))
    prompt = chat.prompt_ids([Message("user", "1+1+1=")])
    assert tuple(samples[0].token_ids.tolist()) == prompt + chat.reply_ids("3")
    # The end-of-sequence token is one that the policy chose, whatever it is padded with elsewhere.
    assert samples[0].token_ids[-1] == chat.reply_ids("")[-1]
    assert samples[0].loss_mask.tolist() == [False] * len(prompt) + [True, True]
    assert samples[0].logprobs.tolist() == [0.0] * len(prompt) + [-0.5, -0.5]
    assert samples[0].advantage.tolist() == [0.0] * len(prompt) + [1.0, 1.0]
    assert samples[1].advantage[-1] == -1.0
    assert samples[0].weight_version == 3
    assert [sample.rollout_id for sample in samples] == [0, 1]


@pytest.mark.parametrize("hang", [False, True])
def test_an_episode_whose_environment_fails_is_counted_and_no_zero(chat: Chat, hang: bool) -> None:
    # The third is broken, so right and wrong among the other three: means over 3, not over 4.
    groups = play(chat, Breaking(hang), ["3", "3", "3", "4"])
    samples, _ = judge(groups, Grpo(normalize_rewards=False, use_leave_one_out_baseline=False))
    assert len(groups[0].broken) == 1
    assert [sample.advantage[-1] for sample in samples] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    assert ("TimeoutError" if hang else "the judge is gone") in groups[0].broken[0]


def test_groups_without_signal_are_counted_by_reason(chat: Chat) -> None:
    groups = play(chat, Arithmetic(ArithmeticEnv(), 1), ["3", "3", "4", "5", None, "3", "3", "4"], tasks=4)
    samples, metrics = judge(groups, Grpo(use_leave_one_out_baseline=False))
    assert metrics["train:groups_with_signal"] == 1
    assert metrics["train:dropped_groups/all_correct"] == 1
    assert metrics["train:dropped_groups/none_correct"] == 1
    assert metrics["train:dropped_groups/too_few_episodes"] == 1
    assert len(samples) == 7


def an_episode(reward: float, logprobs: Sequence[float], correct: bool = True) -> Episode:
    return conversation(reward, completion(range(9, 9 + len(logprobs)), logprobs), prompt=(1, 2), correct=correct)


@pytest.mark.parametrize("unknown", [math.nan, -math.inf, math.inf])
def test_a_token_without_a_logprob_leaves_the_loss_and_its_denominator(unknown: float) -> None:
    group = Group(TASK, (an_episode(1.0, [-0.5, unknown, -0.5]), an_episode(0.0, [-0.5] * 2)), ())
    samples, metrics = judge([group], Grpo())
    assert samples[0].loss_mask.tolist() == [False, False, True, False, True]
    assert samples[0].logprobs.tolist() == [0.0, 0.0, -0.5, 0.0, -0.5]
    assert samples[0].advantage.tolist() == [0.0, 0.0, 1.0, 0.0, 1.0]
    assert metrics["train:tokens_without_logprob"] == 1
    assert loss_weights(samples, LossFn()) == [1 / 4] * 2
    assert loss_weights(samples, LossFn(token_level_loss=False)) == [1 / 4] * 2


def test_a_reward_that_is_no_number_is_the_environments_fault_and_counted(chat: Chat) -> None:
    class Odd(Arithmetic):
        def environment(self) -> Environment:  # type: ignore[override]
            environment = super().environment()
            environment.score = self._odd  # type: ignore[method-assign]
            return environment

        async def _odd(self) -> Score:
            return Score(math.nan, correct=False)

    (group,) = play(chat, Odd(ArithmeticEnv(), 1), ["3", "4"])
    assert group.episodes == ()
    assert "reward must be a number from -1e+09 to 1e+09, found nan" in group.broken[0]


def test_logprobs_must_be_as_many_as_tokens() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1 logprobs"):
        completion((1, 2), (-0.5,))


def test_the_kl_of_an_episode_lowers_its_reward_before_the_advantage() -> None:
    group = Group(TASK, (an_episode(1.0, [-0.5, None, -0.7]), an_episode(1.0, [-0.5])), ())
    references = [[math.nan, 0.0, -0.6, -9.0, -1.7], [0.0, 0.0, -0.5]]
    samples = [
        replace(sample, reference_logprobs=numpy.array(each, numpy.float32))
        for sample, each in zip(make_samples([group]), references, strict=True)
    ]
    grpo = Grpo(normalize_rewards=False)
    loss_fn = LossFn(reference_policy_kl_penalty=0.5, reference_policy_kl_type="k1", use_kl_in_reward=True)
    credited, metrics = credit([group], samples, grpo, loss_fn)
    # 0.1 on the first token and 1.0 on the third; the second is in nothing.
    assert credited[0].advantage[-1] == pytest.approx(-0.55, abs=1e-6)
    assert credited[1].advantage[-1] == pytest.approx(0.55, abs=1e-6)
    assert metrics["train:groups_with_signal"] == 1
    assert metrics["train:kl_penalty"] == pytest.approx(1.1 / 3, abs=1e-6)
    # The policy's own logprobs are the better ones, where they are known.
    own = [replace(sample, prev_logprobs=sample.reference_logprobs) for sample in samples]
    credited, metrics = credit([group], own, grpo, loss_fn)
    assert metrics["train:kl_penalty"] == 0
    assert not credited[0].advantage.any()
    with pytest.raises(ValueError, match="reference_logprobs"):
        credit([group], make_samples([group]), grpo, loss_fn)


def test_an_episode_split_into_samples_has_one_advantage_and_one_kl() -> None:
    group = Group(TASK, (an_episode(1.0, [-0.5, -0.7]), an_episode(0.0, [-0.5])), ())
    first, second = make_samples([group])
    first, second = (
        replace(sample, reference_logprobs=sample.logprobs - sample.loss_mask.astype(numpy.float32))
        for sample in (first, second)
    )
    parts = [replace(first, loss_mask=numpy.array([False, False, index == 0, index == 1])) for index in range(2)]
    grpo = Grpo(normalize_rewards=False)
    loss_fn = LossFn(reference_policy_kl_penalty=0.1, reference_policy_kl_type="k1", use_kl_in_reward=True)
    whole, _ = credit([group], [first, second], grpo, loss_fn)
    split, metrics = credit([group], [*parts, second], grpo, loss_fn)
    assert whole[0].advantage[-1] == pytest.approx(1 - 0.2 + 0.1, abs=1e-6)
    assert split[0].advantage.tolist() == pytest.approx([0, 0, whole[0].advantage[-1], 0])
    assert split[1].advantage.tolist() == pytest.approx([0, 0, 0, whole[0].advantage[-1]])
    assert metrics["train:kl_penalty"] == pytest.approx(1.0, abs=1e-6)


def test_a_multi_turn_episode_has_one_advantage_and_masks_template_tokens() -> None:
    replies = [completion((5, 6), (-0.5, math.nan)), completion((7,), (-0.7,)), completion((4, 4), (-0.1, -0.2))]
    long = conversation(1.0, *replies, prompt=(1, 2), added=(8, 9), new=(2,))
    group = Group(TASK, (long, an_episode(0.0, [-0.5])), ())
    samples, metrics = judge([group], Grpo(normalize_rewards=False))
    assert [sample.token_ids.tolist() for sample in samples] == [[1, 2, 5, 6, 8, 9, 7], [1, 2, 4, 4], [1, 2, 9]]
    assert [sample.rollout_id for sample in samples] == [0, 0, 1]
    assert samples[0].loss_mask.tolist() == [False, False, True, False, False, False, True]
    assert samples[0].logprobs.tolist() == pytest.approx([0, 0, -0.5, 0, 0, 0, -0.7])
    assert samples[0].advantage.tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert samples[1].advantage.tolist() == [0, 0, 1, 1]
    assert metrics["train:tokens_without_logprob"] == 1
    # Two episodes, the first of four tokens that count.
    assert loss_weights(samples, LossFn(token_level_loss=False)) == [1 / 2 / 4, 1 / 2 / 4, 1 / 2]


def test_equal_rewards_with_a_wrong_episode_have_their_own_drop_reason() -> None:
    group = Group(TASK, (an_episode(0.5, [-0.5]), an_episode(0.5, [-0.5], correct=False)), ())
    _, metrics = judge([group], Grpo())
    assert metrics["train:dropped_groups/equal_rewards"] == 1


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
                limits=Limits(1, 1.0, None, 100),
            )
        )


def test_every_episode_of_a_step_and_every_step_draws_other_random_numbers() -> None:
    seeds = {each.seed for step in range(20) for each in Sampling(1.0, 5, (1, 0, step)).of_episodes(20)}
    assert len(seeds) == 400
