"""slurmkit render"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slurmkit.cli.options import JobCommand, job_options, request_from
from slurmkit.job.render import render
from slurmkit.job.settle import settle
from slurmkit.run.directory import write_beside


@click.command("render", cls=JobCommand)
@click.option("--out", type=click.Path(path_type=Path), help="Write the file here instead of printing it.")
@job_options(slurm=True)
@click.pass_context
def command(context: click.Context, /, out: Path | None, words: tuple[str, ...], **options: Any) -> None:
    """Print or write the sbatch file that submit would submit, byte for byte."""
    settled = settle(request_from(context, words, options), Path.cwd())
    script = render(settled.spec, settled.templates)
    if out is None:
        click.echo(script, nl=False)
    else:
        write_beside(out, script)
        click.echo(f"wrote {out}", err=True)
