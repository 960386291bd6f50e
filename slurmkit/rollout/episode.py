"""One conversation between the policy and an environment, token-exact."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Literal, Protocol

import numpy

from slurmkit.config.schema import TrainConfig
from slurmkit.envs.environment import Environment, Message, Opening, Score, Task
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.rollout.boundary import asked
from slurmkit.rollout.chat import Chat, Prompt
from slurmkit.rollout.contract import check_answers, check_opening, check_score
from slurmkit.rollout.tool_calls import MalformedCall, Reading

# stop: the environment had nothing more to say. length: a reply was cut, or what came after it left no room for one.
# prompt_too_long: there was no room for a first reply. max_turns, timeout: see Limits.
EpisodeEnd = Literal["stop", "length", "prompt_too_long", "max_turns", "timeout"]


class Generate(Protocol):
    """Whoever completes prompts: the pool of engines."""

    async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        """Tokens in, tokens out."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an episode may take: replies of the model, seconds of any one call of the environment and of the whole from
    its opening on, characters of any one answer. Tokens are limited by the engine."""

    max_turns: int
    call_seconds: float
    episode_seconds: float | None
    max_answer_chars: int

    @classmethod
    def of(cls, config: TrainConfig) -> Limits:
        """As the configuration says."""
        env = config.env
        return cls(
            config.grpo.max_rollout_turns, env.timeout_seconds, env.episode_timeout_seconds, env.max_tool_output_chars
        )


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One reply. `added_ids` stand before it: all of its prompt where a sample begins, else what the template wrote
    since the reply before.

    Example, of an episode in one sample: Turn((1, 2, 3), first, True), Turn((8, 9), second, False) is the sequence
    1 2 3, the first reply's tokens, 8 9, the second reply's tokens.
    """

    added_ids: tuple[int, ...]
    completion: Completion
    begins_sample: bool


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A finished conversation: exactly the tokens that the engine was given and gave back.

    Without a turn where there was no room, or no time, for a first reply.
    """

    task: Task
    prompt_ids: tuple[int, ...]
    """Of the first reply."""
    turns: tuple[Turn, ...]
    temperature: float
    score: Score
    finish_reason: EpisodeEnd
    messages: tuple[Message, ...] = ()
    """The conversation, replies included."""
    num_tool_calls: int = 0
    """Calls that the model meant to make."""
    num_malformed_calls: int = 0
    """Those of them that could not be made."""

    num_sampled_tokens: int = field(init=False)
    """Of all replies."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_sampled_tokens", sum(len(turn.completion.token_ids) for turn in self.turns))

    @property
    def samples(self) -> list[tuple[Turn, ...]]:
        """The turns of each of the sequences that the episode consists of."""
        starts = [index for index, turn in enumerate(self.turns) if turn.begins_sample]
        return [self.turns[start:end] for start, end in pairwise((*starts, len(self.turns)))]

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of each of them; the prompt's alone where nothing was sampled."""
        lengths = [sum(len(t.added_ids) + len(t.completion.token_ids) for t in turns) for turns in self.samples]
        return lengths or [len(self.prompt_ids)]


async def run_episode(
    task: Task, environment: Environment, policy: Generate, chat: Chat, sampling: SamplingParams, limits: Limits
) -> Episode:
    """Play one episode.

    Raises BrokenEnvironment, which names the task, if the environment raises, takes longer than `limits.call_seconds`
    over a call, or returns a value against its contract. Failures of the engines pass through.

    The environment is asked for the score whatever ended the episode. A prompt that does not fit is scored like an
    empty reply; a cut reply is one without calls.
    """
    opened = await opening(task, environment, timeout_seconds=limits.call_seconds)
    play = _Play(task, environment, policy, chat, sampling, limits, chat.prompt(opened), list(opened.messages))
    prompt_ids = play.prompt.ids
    try:
        async with asyncio.timeout(limits.episode_seconds) as deadline:
            reason = await play.to_its_end()
    except TimeoutError:
        if not deadline.expired():
            raise
        reason = "timeout"
    score = await asked(environment.score, check_score, task, environment, limits.call_seconds)
    return Episode(
        task,
        prompt_ids,
        tuple(play.turns),
        sampling.temperature,
        score,
        reason,
        tuple(play.messages),
        play.num_calls,
        play.num_malformed,
    )


@dataclass(slots=True)
class _Play:
    """An episode under way."""

    task: Task
    environment: Environment
    policy: Generate
    chat: Chat
    sampling: SamplingParams
    limits: Limits
    prompt: Prompt
    messages: list[Message]
    turns: list[Turn] = field(default_factory=list)
    num_calls: int = 0
    num_malformed: int = 0

    async def to_its_end(self) -> EpisodeEnd:
        while True:
            completion = await self.policy.generate(self.prompt.ids, _of_turn(self.sampling, len(self.turns)))
            if not len(completion.token_ids):
                if self.turns:
                    return "length"
                await self._step(Reading(""))
                return "prompt_too_long"
            self.turns.append(Turn(self.prompt.added_ids, completion, self.prompt.is_new))
            if completion.finish_reason == "length":
                await self._step(Reading(completion.text))
                return "length"
            reading = self.chat.read(completion, self.prompt.tools, first=self.num_calls)
            self.num_calls += len(reading.calls)
            self.num_malformed += len(reading.calls) - len(reading.tool_calls)
            answers = await self._step(reading)
            if not answers:
                return "stop"
            self.messages += answers
            if len(self.turns) >= self.limits.max_turns:
                return "max_turns"
            self.prompt = self.chat.after(self.prompt, completion, answers)

    async def _step(self, reading: Reading) -> list[Message]:
        """What follows a reply; calls that cannot be made are answered here, and the others by the environment."""
        reply = Message("assistant", reading.content, reading.tool_calls)
        self.messages.append(reply)
        given: Sequence[Message] = ()
        if reply.tool_calls or not reading.calls:
            step = partial(self.environment.step, reply)
            given = await asked(step, check_answers, self.task, self.environment, self.limits.call_seconds)
            if not given:
                return []
        answers, rest = list[Message](), iter(given)
        for call in reading.calls:
            if isinstance(call, MalformedCall):
                answers.append(Message("tool", call.problem, tool_call_id=call.id, name=call.name))
            else:
                answers += islice(rest, 1)
        return [self._cut(answer) for answer in (*answers, *rest)]

    def _cut(self, answer: Message) -> Message:
        """Before anything is made of it: a template and a tokenizer would take seconds over ten megabytes."""
        length, most = len(answer.content), self.limits.max_answer_chars
        if length <= most:
            return answer
        return replace(answer, content=f"{answer.content[:most]}\n[cut here: {length - most} more characters]")


def _of_turn(sampling: SamplingParams, turn: int) -> SamplingParams:
    """A later turn's seed follows from the first one's, so that a run that goes on draws the same again."""
    if not turn:
        return sampling
    seed = numpy.random.SeedSequence(sampling.seed, spawn_key=(turn,)).generate_state(1, numpy.uint64)
    return replace(sampling, seed=int(seed[0]))


async def opening(task: Task, environment: Environment, *, timeout_seconds: float) -> Opening:
    """Return what an episode starts with. Raises BrokenEnvironment as `run_episode` does."""
    return await asked(partial(environment.start, task), check_opening, task, environment, timeout_seconds)
