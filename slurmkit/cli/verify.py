"""slurmkit verify"""

from __future__ import annotations

import sys

import click

from slurmkit.cli.names import JobType
from slurmkit.job.check import diff_of
from slurmkit.run import verify
from slurmkit.slurm.connect import connect


@click.command("verify")
@click.argument("job_id", metavar="RUN", type=JobType())
def command(job_id: str) -> None:
    """Compare a job's script in Slurm with the files on disk and in git.

    RUN is a name in ./results, the path of a run directory, or a job id. A run stands for its newest job.

    Exit code: 0 all are the same, 1 one differs or is missing, 2 there is nothing to compare.
    """
    script = verify.stored_script(job_id, connect())
    places = list(verify.places(job_id, script))
    click.echo(f"job {job_id}, as Slurm stores it, and")
    for place in places:
        click.echo(f"{place.verdict:<9}{place.name}")
    for place in places:
        if place.verdict == "differs" and place.text is not None:
            click.echo(diff_of(script, place.text, f"job {job_id}", place.name), nl=False)
    sys.exit(any(place.verdict != "same" for place in places))
