"""`python -m slurmkit.bench.slow_episodes`: one run whose environment takes a time of its own for each episode.

The times are log-normal, most of them short and a few many times as long, as those of tools and tests that episodes
wait for; they follow from the seed, the task and which of its episodes it is, so all runs of a seed wait equally long.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from slurmkit.bench.child import answer
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Agent, Environment, Message, Opening, Score, Task
from slurmkit.grpo.interrupt import Interrupts
from slurmkit.grpo.trainer import train


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. Episodes take `median_seconds` × exp(`spread` × a standard normal)."""

    age: int
    seed: int = 1
    steps: int = 60
    prompts: int = 16
    generations: int = 16
    median_seconds: float = 0.05
    spread: float = 1.0


@dataclass(slots=True)
class Times:
    """How long episodes take, in seconds."""

    settings: Settings
    episodes: Counter[str] = field(default_factory=Counter)
    total: float = 0.0
    """Seconds of all episodes so far."""

    def of_next(self, task: Task) -> float:
        """Of a task's next episode."""
        self.episodes[task.name] += 1
        rng = Random(f"{self.settings.seed} {task.name} {self.episodes[task.name]}")
        seconds = self.settings.median_seconds * math.exp(self.settings.spread * rng.gauss(0, 1))
        self.total += seconds
        return seconds


class _SlowEnvironment:
    """Another environment, whose judgement takes its time."""

    def __init__(self, inner: Environment, times: Times) -> None:
        self._inner = inner
        self._times = times
        self._seconds = 0.0

    async def start(self, task: Task) -> Opening:
        self._seconds = self._times.of_next(task)
        return await self._inner.start(task)

    async def step(self, reply: Message) -> Sequence[Message]:
        return await self._inner.step(reply)

    async def score(self) -> Score:
        await asyncio.sleep(self._seconds)
        return await self._inner.score()


class _SlowDomain:
    """The tasks of another domain, in environments that take their time while training."""

    def __init__(self, config: TrainConfig, times: Times) -> None:
        self._inner = make_domain(config)
        self._times = times
        self.train_sources = self._inner.train_sources
        self.train_tasks = self._inner.train_tasks
        self.validation_tasks = self._inner.validation_tasks

    def environment(self) -> Environment:
        environment = self._inner.environment()
        assert not isinstance(environment, Agent)
        return _SlowEnvironment(environment, self._times)

    def demonstrate(self, task: Task, rng: Random) -> str:
        return self._inner.demonstrate(task, rng)


def measure(settings: Settings) -> dict[str, Any]:
    """Train, and return the means over `settings.steps` steps. `last_reward` is the mean of their last quarter.

    One step before these is left out, and `age` steps after them. With an age above 0, rollouts of the first measured
    steps are ready when the time begins; the rollouts of as many later steps are made before it ends.
    """
    times = Times(settings)
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-", dir="/var/tmp") as folder:
        config = TrainConfig.model_validate(_config(settings, Path(folder)))
        asyncio.run(train(config, Interrupts(), make_domain=lambda config: _SlowDomain(config, times)))
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    all_steps = len(lines)
    lines = lines[1 : 1 + settings.steps]
    late = lines[-max(1, len(lines) // 4) :]
    seconds = sum(line["time:step"] for line in lines)
    episodes = settings.prompts * settings.generations
    return {
        "settings": asdict(settings),
        "figures": {
            "tokens_per_second": sum(line["train:total_tokens"] for line in lines) / seconds,
            "step_seconds": seconds / len(lines),
            "completion_tokens_per_step": fmean(line["train:completion_tokens_mean"] for line in lines) * episodes,
            "trained_tokens_per_step": fmean(line.get("train:trained_tokens", 0.0) for line in lines),
            "episode_seconds_per_step": times.total / all_steps,
            "trainer_idle": fmean(line["perf:trainer_idle"] for line in lines),
            "engines_idle": fmean(line["perf:engines_idle"] for line in lines),
            "age_mean": fmean(line["train:age_mean"] for line in lines),
            "age_max": max(line["train:age_max"] for line in lines),
            "first_reward": lines[0]["train:reward_mean"],
            "last_reward": fmean(line["train:reward_mean"] for line in late),
        },
    }


def _config(settings: Settings, folder: Path) -> dict[str, Any]:
    return {
        "env": {"name": "arithmetic", "arithmetic": {"num_terms": 2}},
        "policy": {
            "from_scratch": {"hidden_size": 64, "intermediate_size": 192, "supervised_steps": 600},
            "max_total_sequence_length": 32,
            "precision": "float32",
            "train_global_batch_size": settings.prompts * settings.generations,
            "train_micro_batch_size": settings.prompts * settings.generations,
            "optimizer": {"kwargs": {"lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.0}},
            "generation": {"max_new_tokens": 4},
        },
        "grpo": {
            "num_prompts_per_step": settings.prompts,
            "num_generations_per_prompt": settings.generations,
            "max_num_steps": 1 + settings.steps + settings.age,
            "max_num_epochs": 1000,
            "max_steps_without_signal": None,
            "val_period": 0,
            "seed": settings.seed,
            "async_grpo": {"enabled": settings.age > 0, "max_trajectory_age_steps": settings.age},
        },
        "loss_fn": {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": 2.0,
        },
        "checkpointing": {"enabled": False, "checkpoint_dir": str(folder), "metric_name": None},
        "cluster": {"gpus_per_node": 0},
    }


if __name__ == "__main__":
    answer(lambda settings: measure(Settings(**settings)))
