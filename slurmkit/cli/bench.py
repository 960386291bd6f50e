"""slurmkit bench"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from slurmkit.errors import UserError
from slurmkit.processes import become

Function = TypeVar("Function", bound=Callable[..., Any])

_PATH = click.Path(path_type=str)
_POSITIVE = click.IntRange(min=1)


class _Numbers(click.ParamType):  # type: ignore[type-arg] # generic in newer releases of click only
    """N,N…: whole numbers, none twice."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """A usage error where it is none."""
        try:
            found = [int(text) for text in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} are no whole numbers with commas between", param, ctx)
        return found if len(set(found)) == len(found) else self.fail(f"{value!r} has one of them twice", param, ctx)


_OF_FAKE_DATA = {
    "shape": click.option(
        "--shape",
        help="tiny, 0.4m, 1m, 20m, small, 100m, qwen3-0.6b, qwen3-4b.  [default: qwen3-0.6b on a GPU, else small]",
    ),
    "seq_length": click.option(
        "--seq-length", type=click.IntRange(2), help="Tokens of a micro-batch.  [default: 16384, 1024]"
    ),
    "sequences": click.option(
        "--sequences", type=_POSITIVE, help="Equally long sequences that these are.  [default: 1]"
    ),
    "micro_batches": click.option("--micro-batches", type=_POSITIVE, help="Micro-batches of a step.  [default: 2]"),
    "vocab_sizes": click.option(
        "--vocab-sizes", type=_Numbers(), help="Two: measure how peak memory grows between them."
    ),
    "precision": click.option(
        "--precision", type=click.Choice(["float32", "bfloat16"]), help="[default: bfloat16, float32]"
    ),
    "seed": click.option("--seed", type=click.IntRange(0), help="Of weights and tokens.  [default: 0]"),
}
_BESIDE_TRL = {
    "trl_python": click.option(
        "--trl-python", type=_PATH, help="Python of an environment with TRL.  [default: one is made in --cache]"
    ),
    "alone": click.option("--alone", is_flag=True, default=None, help="slurmkit without TRL beside it."),
    "models": click.option("--models", metavar="NAME,NAME", help="Of tiny, 0.4M, 20M.  [default: 0.4M,20M]"),
    "seeds": click.option("--seeds", type=_Numbers(), help="Each side runs once for each seed.  [default: 1,2,3,4,5]"),
    "prompts": click.option("--prompts", type=_POSITIVE, help="Tasks of a step.  [default: 8]"),
    "generations": click.option("--generations", type=click.IntRange(2), help="Completions of each.  [default: 8]"),
    "micro_batch": click.option("--micro-batch", type=_POSITIVE, help="Sequences of a micro-batch.  [default: 32]"),
    "max_new_tokens": click.option("--max-new-tokens", type=_POSITIVE, help="Of a completion.  [default: 128]"),
    "new_tokens": click.option("--new-tokens", type=float, help="Mean tokens of a completion.  [default: 30]"),
    "cache": click.option(
        "--cache", type=_PATH, help="Where models and TRL are kept.  [default: ~/.cache/slurmkit/bench]"
    ),
}
_OF_ALL = [
    click.option("--json", "json", is_flag=True, help="Print JSON, for programs."),
    click.option("--save-baseline", type=_PATH, metavar="FILE", help="Keep the figures here, as JSON."),
    click.option("--compare", type=_PATH, metavar="FILE", help="Say what has changed since these were kept."),
]


def _with(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.group("bench")
def command() -> None:
    """Measure the trainer, in processes of its own."""


@command.command("train")
@click.option("--fake-data", is_flag=True, help="The trainer alone, on random tokens and weights of a real shape.")
@click.option("--steps", type=click.IntRange(2), help="Number of steps, of which the first is not timed.  [default: 4]")
@click.option("--threads", type=_POSITIVE, help="Cores and threads.  [default: all]")
@_with(*_OF_FAKE_DATA.values(), *_BESIDE_TRL.values(), *_OF_ALL)
def train(fake_data: bool, **options: Any) -> None:
    """Train beside TRL's GRPOTrainer on the same model, tasks and cores; with --fake-data, the trainer alone."""
    for name in _BESIDE_TRL if fake_data else _OF_FAKE_DATA:
        if options.pop(name) is not None:
            words = ("without", "beside TRL") if fake_data else ("with", "on fake data")
            raise UserError(
                f"--{name.replace('_', '-')} is for a measurement {words[1]}: give it {words[0]} --fake-data"
            )
    if fake_data:
        length, count = options["seq_length"], options["sequences"] or 1
        if length is not None and (length % count or length < 2 * count):
            raise UserError(f"--seq-length {length} cannot be {count} equal sequences of 2 tokens or more")
        sizes = options["vocab_sizes"]
        if sizes is not None and (len(sizes) < 2 or min(sizes) < 1):
            raise UserError(f"--vocab-sizes {','.join(map(str, sizes))}: give two or more, such as 32768,151936")
        _measure("fake-data", options)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slurmkit" / "bench"
    models = options["models"]
    options |= {"cache": options["cache"] or str(cache), "alone": bool(options["alone"])}
    _measure("beside-trl", {**options, "models": models and models.split(",")})


@command.command("driver")
@click.option("--ranks", type=_POSITIVE, help="Policy ranks, and engines.  [default: 64]")
@click.option("--prompts", type=_POSITIVE, help="Tasks of a step.  [default: 64]")
@click.option("--generations", type=click.IntRange(2), help="Rollouts of each.  [default: 16]")
@click.option("--tokens", type=_POSITIVE, help="Of a completion, in the mean.  [default: 256]")
@click.option("--steps", type=click.IntRange(1), help="Beside a first one that is left out.  [default: 20]")
@_with(*_OF_ALL)
def driver(**options: Any) -> None:
    """Measure the driver's own part of a step, with ranks, engines and tasks that take no time."""
    _measure("driver", options)


@command.command("rollout")
@click.option("--groups", type=_POSITIVE, help="Openings.  [default: 64]")
@click.option("--generations", type=_POSITIVE, help="Episodes of each, all at once.  [default: 16]")
@click.option("--turns", type=_POSITIVE, help="Replies of an episode, each with a tool call.  [default: 6]")
@click.option("--tools", type=_POSITIVE, help="Tools that the model may call.  [default: 27]")
@click.option("--words", type=_POSITIVE, help="Of a reply, and of a tool's output.  [default: 60]")
@click.option("--rounds", type=_POSITIVE, help="Beside a first one that is left out.  [default: 3]")
@_with(*_OF_ALL)
def rollout(**options: Any) -> None:
    """Measure the driver's own part of a turn in conversations with tools, with an engine that takes no time."""
    _measure("rollout", options)


@command.command("generate")
@click.option("--shapes", default="0.4m,100m", metavar="NAME,NAME", show_default=True, help="Models of random weights.")
@click.option("--seeds", type=_Numbers(), default="1,2,3", show_default=True, help="Each side runs once for each seed.")
@click.option("--batch", type=_POSITIVE, help="Completions at once.  [default: 32]")
@click.option("--prompt-tokens", type=_POSITIVE, help="Of each prompt.  [default: 128]")
@click.option("--new-tokens", type=_POSITIVE, help="Of a completion, in the mean.  [default: 64]")
@click.option("--rounds", type=_POSITIVE, help="Number of measured rounds, after one warm-up round.  [default: 1]")
@click.option("--threads", type=_POSITIVE, help="Of each engine.  [default: all cores]")
@_with(*_OF_ALL)
def generate(shapes: str, **options: Any) -> None:
    """Measure sampling: both engines beside transformers' own generate, each in a process of its own."""
    _measure("generate", {**options, "shapes": shapes.split(",")})


@command.command("sync")
@click.option(
    "--shapes", default="1m,100m,qwen3-0.6b", metavar="NAME,NAME", show_default=True, help="Models of random weights."
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), help="What is moved.  [default: float32]")
@click.option("--rounds", type=_POSITIVE, help="Beside a first one that is left out.  [default: 5]")
@click.option("--threads", type=_POSITIVE, help="[default: all cores]")
@_with(*_OF_ALL)
def sync(shapes: str, **options: Any) -> None:
    """Measure how long new weights take from the policy to each engine, beside a plain copy of as many bytes."""
    _measure("sync", {**options, "shapes": shapes.split(",")})


@command.command("async")
@click.option("--ages", type=_Numbers(), default="1,2", show_default=True, help="max_trajectory_age_steps, beside 0.")
@click.option("--seeds", type=_Numbers(), default="1,2,3,4,5", show_default=True, help="A run of each age for each.")
@click.option("--steps", type=_POSITIVE, help="Beside a first one that is left out.  [default: 60]")
@click.option("--prompts", type=_POSITIVE, help="Tasks of a step.  [default: 16]")
@click.option("--generations", type=click.IntRange(2), help="Episodes of each.  [default: 16]")
@click.option("--median-seconds", type=click.FloatRange(0), help="Of an episode's environment.  [default: 0.05]")
@click.option("--spread", type=click.FloatRange(0), help="Standard deviation of their logarithm.  [default: 1]")
@_with(*_OF_ALL)
def asynchronous(**options: Any) -> None:
    """Measure asynchronous training beside synchronous, in an environment whose episodes take long-tailed times."""
    _measure("async", options)


@command.command("workplace")
@click.option("--episodes", type=click.IntRange(min=10), help="[default: 100000]")
@click.option("--tasks", type=_POSITIVE, help="Different tasks among them.  [default: 280]")
@click.option("--seed", type=click.IntRange(0), help="Of the tasks.  [default: 0]")
@_with(*_OF_ALL)
def workplace(**options: Any) -> None:
    """Measure the Workplace Assistant: episodes a second, and memory over very many."""
    _measure("workplace", options)


def _measure(benchmark: str, options: dict[str, Any]) -> NoReturn:
    """Run it in this process's place, as the trainer's libraries are not for it and a kill must end the benchmark."""
    given = {name: value for name, value in options.items() if value is not None}
    become("slurmkit.bench", json.dumps({"benchmark": benchmark, **given}))
