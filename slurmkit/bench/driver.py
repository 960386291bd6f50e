"""`python -m slurmkit.bench.driver`: the driver's own part of a step, where ranks, engines and tasks take no time.

The real loop (grpo/trainer.py) over the real pool, chat, credit, packing and metrics. Ranks and engines are objects
that answer at once, in place of Ray's actors; the environment does, too. What is left is the driver's own time.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy

from slurmkit.bench.child import answer
from slurmkit.config.model import FromScratch
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.environment import Message, Opening, Score, Task, TaskSource
from slurmkit.envs.tasks import TaskOrder
from slurmkit.generation.engine import Completion, Request
from slurmkit.generation.pool import EnginePool
from slurmkit.generation.transfer import WeightTransfer
from slurmkit.grpo import trainer
from slurmkit.grpo.ahead import Rollouts
from slurmkit.grpo.checkpoint import Checkpoints, TrainerState
from slurmkit.grpo.from_scratch import make_model
from slurmkit.grpo.interrupt import Interrupts
from slurmkit.grpo.loss_sums import LossSums
from slurmkit.grpo.metrics import RunLog
from slurmkit.grpo.plots import Plots
from slurmkit.grpo.policy import Policy
from slurmkit.grpo.policy_worker import StepResult
from slurmkit.grpo.saving import Saver
from slurmkit.grpo.throughput import Description, Gauge, Shape
from slurmkit.grpo.turns import Turns
from slurmkit.rollout.chat import Chat


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step is. `tokens` is the mean length of a completion; they are of any length up to twice that."""

    ranks: int = 64
    prompts: int = 64
    generations: int = 16
    tokens: int = 256
    steps: int = 20
    seed: int = 0


# Where the loop calls what a step is made of, by the names that the figures have.
_PARTS = {
    "rollout": (Rollouts, "of"),
    "samples": (trainer, "make_samples"),
    "credit": (trainer, "credit"),
    "packing": (trainer, "optimizer_steps"),
    "update": (trainer.Trainer, "update"),
    "weights": (EnginePool, "load"),
    "gauge": (Gauge, "read"),
    "log": (RunLog, "write"),
}


class Clock:
    """Seconds of each part in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if asyncio.iscoroutinefunction(call):

            async def waiting(*arguments: Any, **options: Any) -> Any:
                with self._adding(part):
                    return await call(*arguments, **options)

            return waiting

        def calling(*arguments: Any, **options: Any) -> Any:
            with self._adding(part):
                result = call(*arguments, **options)
            if part == "log":  # the last thing of a step
                self._step_ends()
            return result

        return calling

    @contextmanager
    def _adding(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - began

    def _step_ends(self) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        self.steps.append({**self._now, "step": now - self._began, "step_cpu": cpu_now - self._cpu_began})
        self._began, self._cpu_began, self._now = now, cpu_now, {}


class _Rank:
    """A policy rank, or an engine, that answers at once."""

    def __init__(self, settings: Settings, number: int) -> None:
        self.name, self._rng = f"fake {number}", Random(f"{settings.seed} {number}")
        # Ready-made: drawing them is no work of the driver's.
        self._ready = [_completion(settings, self._rng) for _ in range(32)]

    async def call(self, method: str, *arguments: Any) -> Any:
        match method:
            case "update":
                sums = LossSums(tokens=1.0, sequences=1.0, ratio_min=1.0, ratio_max=1.0)
                return StepResult(sums, grad_norm=0.0, lr=0.0, seconds={}, peak_memory_gib=0.0)
            case "lay_weights":
                return {"shared": SimpleNamespace(version=0)}
            case "load":
                return None
            case "submit":
                self._submitted: Mapping[int, Request] = arguments[0]
                return None
            case "collect":
                return {ticket: self._rng.choice(self._ready) for ticket in self._submitted}
        raise AssertionError(f"the driver calls {method}, which is no part of a step here")


def _completion(settings: Settings, rng: Random) -> Completion:
    length = rng.randint(1, 2 * settings.tokens - 1)
    token_ids = numpy.array([rng.randrange(256) for _ in range(length)], numpy.int32)
    logprobs = numpy.array([-rng.random() for _ in range(length)], numpy.float32)
    return Completion(token_ids, logprobs, "a reply", "length", numpy.zeros(length, numpy.int32))


class _Domain:
    """Tasks whose episodes take no time and are worth something every other time."""

    def __init__(self) -> None:
        self.train_tasks = [Task(f"task {index}", f"question {index}", "") for index in range(1000)]
        self.train_sources = [TaskSource(self.train_tasks, 1.0)]
        self.validation_tasks = self.train_tasks[:1]
        self._played = 0

    def environment(self) -> _Domain:
        return self

    def demonstrate(self, task: Task, rng: Random) -> str:
        return ""

    async def start(self, task: Task) -> Opening:
        return Opening(task.messages)

    async def step(self, reply: Message) -> Sequence[Message]:
        return ()

    async def score(self) -> Score:
        self._played += 1
        return Score(float(self._played % 2), bool(self._played % 2))


def measure(settings: Settings) -> dict[str, Any]:
    """Milliseconds of all steps but the first: medians of the whole and of each part.

    `step_cpu_ms` is the processor's time, of which another load on the machine takes little, and `worst_step_cpu_ms`
    the worst step's.
    """
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-") as folder, ExitStack() as stack:
        for part, (owner, name) in _PARTS.items():
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        asyncio.run(_run(settings, Path(folder)))
    steps = clock.steps[1:]
    parts = {
        part: statistics.median(step.get(part, 0.0) for step in steps) * 1000 for part in (*_PARTS, "step", "step_cpu")
    }
    parts["other"] = max(0.0, parts["step"] - sum(parts[part] for part in _PARTS))
    # Engines work while episodes are played, and what the driver does there is hidden behind them; the rest is not.
    parts["between_rollouts"] = parts["step"] - parts["rollout"]
    figures = {f"{part}_ms": value for part, value in parts.items()} | {
        "worst_step_cpu_ms": max(step["step_cpu"] for step in steps) * 1000,
        "all_step_ms": [step["step"] * 1000 for step in clock.steps],
        "all_step_cpu_ms": [step["step_cpu"] * 1000 for step in clock.steps],
    }
    return {"settings": asdict(settings), "figures": figures}


async def _run(settings: Settings, folder: Path) -> None:
    samples = settings.prompts * settings.generations
    config = TrainConfig.model_validate(
        {
            "grpo": {
                "num_prompts_per_step": settings.prompts,
                "num_generations_per_prompt": settings.generations,
                "max_num_steps": settings.steps + 1,
                "val_period": 0,
                "seed": settings.seed,
            },
            "checkpointing": {"checkpoint_dir": str(folder), "enabled": False},
            "policy": {
                "model_name": str(folder / "model"),
                "train_global_batch_size": samples,
                "max_total_sequence_length": 2 * settings.tokens + 64,
            },
            "env": {"name": "arithmetic"},
            "cluster": {"num_nodes": settings.ranks, "gpus_per_node": 0},
        }
    )
    domain = _Domain()
    sizes = FromScratch(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, supervised_steps=0)
    make_model(folder / "model", sizes, domain, max_length=64, seed=settings.seed)
    fakes: list[Any] = [_Rank(settings, number) for number in range(settings.ranks)]
    order = TaskOrder(domain.train_sources, seed=settings.seed, shuffle=True)
    last_step = settings.steps + 1
    state = TrainerState(0, 0, 0, 0, order.digest, {})
    with RunLog(folder, config, last_step=last_step, resume_after=None) as log:
        chat = Chat(folder / "model")
        policy = Policy(
            fakes,
            [rank.name for rank in fakes],
            tensor_parallel_size=1,
            micro_batch_tokens=config.policy.micro_batch_tokens,
        )
        transfer = WeightTransfer(fakes, "here", fakes, ["shared"] * len(fakes), folder=folder)
        checkpoints = Checkpoints(folder, config.checkpointing)
        async with (
            EnginePool(fakes, config.policy.generation.max_batch_size) as pool,
            Plots(folder) as plots,
            Saver(checkpoints, policy, chat, config, saved=None, started=time.monotonic()) as saver,
        ):
            parts: dict[str, Any] = {
                "config": config,
                "domain": domain,
                "order": order,
                "chat": chat,
                "pool": pool,
                "policy": policy,
                "turns": Turns(policy, pool, transfer, are_taken=False),
                "saver": saver,
                "log": log,
                "plots": plots,
                "gauge": Gauge(config, Description(Shape(parameters=1, layers=1, hidden_size=1), "CPU")),
                "interrupts": Interrupts(),
                "last_step": last_step,
                "state": state,
            }
            await trainer.Trainer(**parts).run()


if __name__ == "__main__":
    answer(lambda settings: measure(Settings(**settings)))
