"""Many episodes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from slurmkit.config.schema import TrainConfig
from slurmkit.envs.environment import Agent, Domain, Environment, Task
from slurmkit.errors import UserError
from slurmkit.generation.actors import together
from slurmkit.generation.engine import SamplingParams
from slurmkit.rollout.agent import run_agent
from slurmkit.rollout.boundary import BrokenEnvironment
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.episode import Episode, Generate, Limits, opening, run_episode


@dataclass(frozen=True, slots=True)
class Group:
    """The episodes of one task. `broken` has one text for each missing episode: how its environment failed."""

    task: Task
    episodes: tuple[Episode, ...]
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a round of episodes is sampled; every completion's own seed follows from `seed` and its place.

    `first` is the place of the round's first episode, so that several rounds can share a `seed`.
    """

    temperature: float
    max_new_tokens: int
    seed: tuple[int, ...]
    first: int = 0
    top_p: float = 1.0
    top_k: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, key: tuple[int, ...], first: int = 0) -> Sampling:
        """As the configuration says. Rounds with the same `key` and `first` draw the same random numbers."""
        generation = config.policy.generation
        limit = generation.max_new_tokens or config.policy.max_total_sequence_length
        seed = (config.grpo.seed, *key)
        return cls(generation.temperature, limit, seed, first, generation.top_p, generation.top_k)

    def of_episodes(self, count: int) -> list[SamplingParams]:
        """Of the round's episodes in order."""
        # A place's number does not depend on how many are drawn with it.
        seeds = numpy.random.SeedSequence(self.seed).generate_state(self.first + count, numpy.uint64)[self.first :]
        return [
            SamplingParams(self.temperature, self.max_new_tokens, seed, self.top_p, self.top_k)
            for seed in seeds.tolist()
        ]


async def collect(
    tasks: Sequence[Task],
    *,
    episodes_per_task: int,
    domain: Domain,
    policy: Generate,
    chat: Chat,
    sampling: Sampling,
    limits: Limits,
    weight_version: int = 0,
    finished: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Play `episodes_per_task` episodes of every task, all concurrently. Call `finished` after each one.

    `weight_version` is that of the present weights, for who plays episodes without being told.

    An episode whose environment raises, or returns a value against its contract, is missing from its group and named
    there. A failing engine ends everything.
    """

    async def play(task: Task, sampling: SamplingParams) -> Episode | str:
        try:
            environment = _environment(domain, task)
            if isinstance(environment, Agent):
                return await run_agent(
                    task,
                    environment,
                    temperature=sampling.temperature,
                    weight_version=weight_version,
                    timeout_seconds=limits.call_seconds,
                )
            return await run_episode(task, environment, policy, chat, sampling, limits)
        except BrokenEnvironment as error:
            return str(error)
        finally:
            finished()

    rollouts = [task for task in tasks for _ in range(episodes_per_task)]
    played = await together(*map(play, rollouts, sampling.of_episodes(len(rollouts))))
    groups = []
    for first, task in zip(range(0, len(played), episodes_per_task), tasks, strict=True):
        outcomes = played[first : first + episodes_per_task]
        groups.append(
            Group(
                task,
                episodes=tuple(outcome for outcome in outcomes if isinstance(outcome, Episode)),
                broken=tuple(outcome for outcome in outcomes if isinstance(outcome, str)),
            )
        )
    return groups


def _environment(domain: Domain, task: Task) -> Environment | Agent:
    """Make a fresh environment. Raises BrokenEnvironment if the domain fails to."""
    try:
        return domain.environment()
    except Exception as error:
        raise BrokenEnvironment(task, domain, error) from error


async def refuse_prompts_that_never_fit(
    name: str, tasks: Sequence[Task], domain: Domain, chat: Chat, config: TrainConfig
) -> None:
    """UserError where not one of the tasks has a prompt that leaves room for a reply. Stops at the first that does."""
    limit, shortest = config.policy.max_total_sequence_length, (0, "")
    for task in tasks:
        try:
            environment = _environment(domain, task)
            if isinstance(environment, Agent):
                return  # which alone knows what it will ask
            opened = await opening(task, environment, timeout_seconds=config.env.timeout_seconds)
        except BrokenEnvironment:
            return  # the rollouts will say so
        length = len(chat.prompt(opened).ids)
        if length < limit:
            return
        shortest = min(shortest, (length, task.name)) if shortest[0] else (length, task.name)
    if tasks:
        raise UserError(
            f"policy.max_total_sequence_length {limit} has no room for a reply to any of the {len(tasks)} {name} "
            f"tasks: the shortest prompt, of {shortest[1]}, has {shortest[0]} tokens"
        )
