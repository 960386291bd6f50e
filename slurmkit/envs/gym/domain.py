"""NeMo Gym's rows, with the server that poses and judges them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from slurmkit.config.schema import TrainConfig
from slurmkit.envs.environment import Agent, Environment, Task, TaskSource
from slurmkit.envs.gym.agent import GymAgent
from slurmkit.envs.gym.client import GymClient
from slurmkit.envs.gym.resources import GymEpisode
from slurmkit.envs.gym.rows import read_tasks
from slurmkit.envs.tasks import read_sources
from slurmkit.errors import UserError


class Gym:
    """Tasks from Gym's JSONL. UserError names the first bad row of every source, or the server that is none."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config.env.gym
        train, held_out = read_sources(config.data, lambda _, source: list(read_tasks(Path(str(source.data_path)))))
        self.train_sources: Sequence[TaskSource] = train
        self.train_tasks: Sequence[Task] = [task for source in train for task in source.tasks]
        self.validation_tasks: Sequence[Task] = held_out
        self._client = GymClient(self._config, timeout_seconds=config.env.timeout_seconds, seed=config.grpo.seed)
        generation = config.policy.generation
        self._sampling = {"temperature": generation.temperature, "top_p": generation.top_p}
        if generation.max_new_tokens is not None:
            self._sampling["max_output_tokens"] = generation.max_new_tokens
        self._checking: asyncio.Task[None] | None = None
        if self._config.url is not None:
            checking = self._client.check("url", ("/seed_session", "/verify"), "a resources server of NeMo Gym")
            # Domains are made inside of the driver's event loop, before there is anything else to do in it.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(asyncio.run, checking).result()

    def environment(self) -> Environment | Agent:
        if self._config.url is not None:
            return GymEpisode(self._config, self._client)
        return GymAgent(self._config, self._client, self._sampling, self._agent_is_there)

    async def _agent_is_there(self) -> None:
        """An agent server can only be started when the policy is served, so it is waited for by the first episodes."""
        if self._checking is None:
            self._checking = asyncio.create_task(
                self._client.check("agent_url", ("/run",), "an agent server of NeMo Gym")
            )
        await asyncio.shield(self._checking)

    def demonstrate(self, task: Task, rng: Random) -> str:
        raise UserError("env.name gym has no right answers to show to a model from scratch: give policy.model_name")
