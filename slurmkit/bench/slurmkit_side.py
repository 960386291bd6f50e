"""`python -m slurmkit.bench.slurmkit_side SETTINGS.json`: slurmkit's side of `slurmkit bench train`.

The driver as in `python -m slurmkit.grpo`, with a private Ray. Only the lengths of completions are replaced.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from slurmkit.bench import forced
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.environment import Message, Opening, Score, Task, TaskSource
from slurmkit.generation.engine import SamplingParams
from slurmkit.grpo.interrupt import Interrupts
from slurmkit.grpo.trainer import train
from slurmkit.rollout.collect import Sampling


class _Questions:
    """The domain: questions whose replies get a reward that follows from their text."""

    def __init__(self) -> None:
        self.train_tasks: Sequence[Task] = [Task(question, question, "") for question in forced.QUESTIONS]
        self.train_sources = [TaskSource(self.train_tasks, 1.0)]
        self.validation_tasks = self.train_tasks[:1]

    def environment(self) -> _Episode:
        return _Episode()

    def demonstrate(self, task: Task, rng: Random) -> str:
        raise NotImplementedError("the model is not trained on demonstrations")


class _Episode:
    async def start(self, task: Task) -> Opening:
        return Opening(task.messages)

    async def step(self, reply: Message) -> Sequence[Message]:
        self._reply = reply.content
        return ()

    async def score(self) -> Score:
        return Score(forced.reward(self._reply), False)


def main(path: str) -> None:
    """Train. `metrics.jsonl` in the configured folder has the figures."""
    settings = json.loads(Path(path).read_text())
    as_configured = Sampling.of_episodes

    def of_episodes(sampling: Sampling, count: int) -> list[SamplingParams]:
        # The configured min_new_tokens is the limit, so a completion has exactly max_new_tokens tokens.
        step = sampling.seed[-1]
        lengths = forced.lengths(settings["seed"], step, count, settings["new_tokens"], settings["max_new_tokens"])
        given = as_configured(sampling, count)
        return [replace(each, max_new_tokens=length) for each, length in zip(given, lengths, strict=True)]

    config = TrainConfig.model_validate(settings["config"])
    make_domain: Any = lambda config: _Questions()  # noqa: E731
    with patch.object(Sampling, "of_episodes", of_episodes):
        asyncio.run(train(config, Interrupts(), make_domain=make_domain))


if __name__ == "__main__":
    main(sys.argv[1])
