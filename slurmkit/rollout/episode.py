"""One conversation between the policy and an environment, token-exact."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from functools import partial
from math import isfinite
from types import coroutine
from typing import Any, Protocol, TypeVar, cast

from slurmkit.envs.environment import Environment, Message, Opening, Score, Task
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.rollout.chat import Chat

Answer = TypeVar("Answer")


class Generate(Protocol):
    """Whoever completes prompts: the pool of engines."""

    async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        """Tokens in, tokens out."""


class BrokenEnvironment(Exception):
    """The environment raised: the episode says nothing about the policy."""


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished conversation of one turn: exactly the tokens that the engine was given and gave back."""

    task: Task
    prompt_ids: tuple[int, ...]
    completion: Completion
    temperature: float
    score: Score
    messages: tuple[Message, ...] = ()
    """The conversation, the reply included."""


async def run_episode(
    task: Task,
    environment: Environment,
    policy: Generate,
    chat: Chat,
    sampling: SamplingParams,
    *,
    timeout_seconds: float,
) -> Episode:
    """Play one episode.

    BrokenEnvironment, which names the task, where the environment raised, took longer than `timeout_seconds` before or
    after a reply, or gave a reward that is no finite number; failures of the engines pass through.

    A prompt that does not fit is scored like an empty reply.
    """
    messages = (await opening(task, environment, timeout_seconds=timeout_seconds)).messages
    prompt_ids = chat.prompt_ids(messages)
    completion = await policy.generate(prompt_ids, sampling)
    reply = Message("assistant", completion.text)
    score = await _asked(_judged(environment, reply), task, environment, timeout_seconds)
    return Episode(task, prompt_ids, completion, sampling.temperature, score, (*messages, reply))


async def opening(task: Task, environment: Environment, *, timeout_seconds: float) -> Opening:
    """What an episode starts with. BrokenEnvironment as in `run_episode`."""
    return await _asked(environment.start(task), task, environment, timeout_seconds)


async def _judged(environment: Environment, reply: Message) -> Score:
    if await environment.step(reply):
        raise NotImplementedError("episodes of more than one turn")
    score = await environment.score()
    if not isfinite(score.reward):
        raise ValueError(f"the reward is {score.reward}")
    return score


async def _asked(
    answer: Coroutine[Any, Any, Answer], task: Task, environment: Environment, timeout_seconds: float
) -> Answer:
    """What the environment answers, in time."""
    try:
        try:
            waits_for = answer.send(None)
        except StopIteration as done:  # at once, as most do: a deadline would cost the driver more than the answer
            return cast(Answer, done.value)
        async with asyncio.timeout(timeout_seconds):
            return await _rest(answer, waits_for)
    except Exception as error:
        what = f"{type(environment).__qualname__}: {type(error).__name__}: {error}"
        raise BrokenEnvironment(f"task {task.name}: {what}") from error


@coroutine
def _rest(answer: Coroutine[Any, Any, Answer], waits_for: Any) -> Generator[Any, Any, Answer]:
    """A coroutine from its first wait on."""
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:
            resume = partial(answer.throw, error)
        else:
            resume = partial(answer.send, sent)
        try:
            waits_for = resume()
        except StopIteration as done:
            return cast(Answer, done.value)
