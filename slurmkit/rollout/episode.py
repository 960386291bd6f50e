"""One conversation between the policy and an environment, token-exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from slurmkit.envs.environment import Environment, Message, Score, Task
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.rollout.chat import Chat


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


async def run_episode(
    task: Task, environment: Environment, policy: Generate, chat: Chat, sampling: SamplingParams
) -> Episode:
    """Play one episode. BrokenEnvironment where the environment raised; failures of the engines pass through.

    A prompt that does not fit is scored like an empty reply.
    """
    with _blaming(environment):
        messages = await environment.start(task)
    prompt_ids = chat.prompt_ids(messages)
    completion = await policy.generate(prompt_ids, sampling)
    reply = Message("assistant", chat.reply_text(completion.token_ids))
    with _blaming(environment):
        following = await environment.step(reply)
        if following:
            raise NotImplementedError("episodes of more than one turn")
        score = await environment.score()
    return Episode(task, prompt_ids, completion, sampling.temperature, score)


@contextmanager
def _blaming(environment: Environment) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BrokenEnvironment(f"{type(environment).__qualname__}: {type(error).__name__}: {error}") from error
