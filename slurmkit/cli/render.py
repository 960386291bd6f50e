"""slurmkit render"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from slurmkit.cli.options import JobCommand, job_options, request_from
from slurmkit.errors import Failure, UserError
from slurmkit.job.settle import settle
from slurmkit.job.syntax import checked_script
from slurmkit.run.directory import write_together


@click.command("render", cls=JobCommand)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write FILE.sbatch, and FILE.json with what it was made from, instead of printing.",
)
@job_options(slurm=True)
@click.pass_context
def command(context: click.Context, /, out: Path | None, words: tuple[str, ...], **options: Any) -> None:
    """Print or write the sbatch file that submit would submit, byte for byte."""
    settled = settle(request_from(context, words, options), Path.cwd())
    script = checked_script(settled.spec, settled.templates)
    if out is None:
        click.echo(script, nl=False)
        return
    from slurmkit.job import audit

    if out.suffix != ".sbatch":
        raise UserError(f"--out {out}: must end in .sbatch; its record is written beside it, with .json in that place")
    again = audit.command_line(sys.argv[1:], os.environ)
    sidecar = audit.sidecar_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{out} cannot be written: {error.strerror}") from None
    write_together({out: script, sidecar: audit.record(settled, script, out, Path.cwd(), again)})
    click.echo(f"wrote {out} and {sidecar}", err=True)
