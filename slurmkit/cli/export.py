"""slurmkit export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slurmkit.cli.names import RunType
from slurmkit.processes import become


class _Checkpointed(RunType):
    """RUN as everywhere, or the path of anything that holds checkpoints or is one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if (path / "manifest.json").is_file() or any(path.glob("step_*/manifest.json")):
            return path.absolute()
        return super().convert(value, param, ctx)


@click.command("export")
@click.argument("run", type=_Checkpointed())
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--step", metavar="N|best|latest", help="Which checkpoint; the best, where one is, if left out.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights. Left out, float32 as they were trained.",
)
def command(run: Path, target: Path, step: str | None, dtype: str | None) -> None:
    """Write the model of a run's checkpoint to a new folder that transformers and vLLM open.

    RUN may also be the folder of one checkpoint. The checkpoint's digests are verified first.
    """
    options = [*(("--step", step) if step else ()), *(("--dtype", dtype) if dtype else ())]
    # In this process's place, as converting takes torch, which nothing here imports.
    become("slurmkit.grpo.export", *options, "--", str(run), str(target))
