"""slurmkit evaluate"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from slurmkit.cli.names import RunType
from slurmkit.errors import UserError
from slurmkit.processes import become
from slurmkit.run.find import find_run, results_folder

Function = TypeVar("Function", bound=Callable[..., Any])

_POSITIVE = click.IntRange(min=1)


class _Model(RunType):
    """RUN as everywhere, or the path of any folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        return path.absolute() if path.is_dir() else super().convert(value, param, ctx)


class _Baseline(click.ParamType):  # type: ignore[type-arg] # generic in newer releases of click only
    """As CHECKPOINT, or else a name on the hub."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if Path(value).is_dir():
            return str(Path(value).absolute())
        try:
            return str(find_run(value, results_folder(Path.cwd())))
        except UserError:
            return str(value)


def _of_both(function: Function) -> Function:
    for option in (
        click.option("--json", "json", is_flag=True, help="Print JSON, for programs."),
        click.option("--name", help="Of the file in evaluate/.  [default: the kind and the checkpoint]"),
        click.option(
            "--baseline", type=_Baseline(), help="What to compare with: a folder, a run or a name on the hub."
        ),
        click.option("--step", metavar="N|best|latest", help="Of a run; the best, where one is, if left out."),
        click.argument("checkpoint", type=_Model()),
    ):
        function = option(function)
    return function


@click.group("evaluate")
def command() -> None:
    """Tell whether training helped.

    CHECKPOINT is a run, one of its checkpoints, or any folder with a model.
    """


@command.command("env")
@_of_both
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE...]")
@click.option(
    "--config", type=click.Path(path_type=str), metavar="FILE", help="The training configuration.  [default: the run's]"
)
@click.option("--episodes", type=_POSITIVE, help="Of each task.  [default: grpo.val_num_generations_per_prompt]")
def environment(**options: Any) -> None:
    """Play an environment's validation tasks, as in training, with 95 % intervals."""
    for word in options["overrides"]:
        if "=" not in word:
            raise UserError(f"{word!r} is no key=value: evaluate env takes one CHECKPOINT, and overrides")
    _evaluate("env", options)


@command.command("bfcl")
@_of_both
@click.option(
    "--categories", default="all", show_default=True, metavar="NAME,NAME", help="Also non_live, live, multi_turn."
)
@click.option("--limit", type=_POSITIVE, help="Entries of each category, drawn with the seed.  [default: all]")
@click.option("--seed", type=click.IntRange(0), help="[default: 0]")
@click.option("--tool-parser", help="vLLM's, for the model's format of tool calls.  [default: hermes]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="[default: bfloat16]")
@click.option("--max-tokens", type=_POSITIVE, help="Of a reply.  [default: what the context leaves]")
@click.option("--concurrency", type=_POSITIVE, help="Entries that are asked at once.  [default: 32]")
@click.option("--vllm-args", metavar="WORDS", default="", help="More of vLLM's own, as one text.")
@click.option(
    "--server-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="For the server to answer.  [default: 1800]",
)
@click.option(
    "--bfcl-python", type=click.Path(path_type=str), help="Of an environment with bfcl-eval.  [default: made]"
)
@click.option("--nemo-evaluator", is_flag=True, help="Print NeMo Evaluator's command instead, and run it.")
def bfcl(vllm_args: str, **options: Any) -> None:
    """Ask the Berkeley Function-Calling Leaderboard's questions, version 3, through bfcl-eval and vLLM."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slurmkit" / "bfcl"
    try:
        words = shlex.split(vllm_args)
    except ValueError as error:
        raise UserError(f"--vllm-args {vllm_args!r}: {error}") from None
    if options["nemo_evaluator"] and options["baseline"]:
        raise UserError("--nemo-evaluator evaluates one model: run it again for the --baseline")
    _evaluate("bfcl", {**options, "cache": str(cache), "vllm_arguments": words})


def _evaluate(what: str, options: dict[str, Any]) -> NoReturn:
    """In this process's place, as the trainer's libraries are not for it, and a signal is for what is started there."""
    given = {**options, "what": what, "checkpoint": str(options["checkpoint"])}
    become("slurmkit.evaluate", json.dumps(given))
