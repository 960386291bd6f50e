"""slurmkit submit"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from slurmkit.cli.options import JobCommand, job_options, request_from
from slurmkit.errors import UserError
from slurmkit.job.settle import settle
from slurmkit.job.spec import JobSpec
from slurmkit.job.syntax import checked_script
from slurmkit.run import submit as queue
from slurmkit.run.forecast import cost, start
from slurmkit.run.patience import Patience
from slurmkit.slurm.client import JobState
from slurmkit.slurm.connect import connect

# ExitCode 0:53 is how slurmd reports that it could not set up a batch script's files (src/slurmd: ESLURMD_IO_ERROR).
_NO_OUTPUT = 53


@click.command("submit", cls=JobCommand)
@click.option("--dry-run", is_flag=True, help="Do everything but submit; print the file and change nothing on disk.")
@click.option("--wait", is_flag=True, help="Wait for the job, with --until-done for the run, and exit with its code.")
@click.option(
    "--retry-for",
    type=click.FloatRange(min=0),
    default=180.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for Slurm's controller while it is away.",
)
@click.option("--require-committed", is_flag=True, help="Refuse a rendered file that is not as git has it.")
@job_options(slurm=True)
@click.pass_context
def command(
    context: click.Context,
    /,
    dry_run: bool,
    wait: bool,
    retry_for: float,
    require_committed: bool,
    words: tuple[str, ...],
    **options: Any,
) -> None:
    """Render one sbatch file, submit it, and say how to follow it. A rendered file (X.sbatch) is submitted as it is."""
    request = request_from(context, words, options)
    if request.run_file is not None and request.run_file.suffix == ".sbatch":
        from slurmkit.run.committed import few, read_committed

        settled, script, provenance = read_committed(request, require_committed)
        if tree := provenance.get("git", {}).get("tree"):
            click.echo(f"warning: the work tree differs from HEAD, and the job runs its files: {few(tree)}", err=True)
    else:
        settled, provenance = settle(request, Path.cwd()), {}
        rule = "--require-committed" if require_committed else settled.committed_only
        if rule is not None:
            raise UserError(
                f"only a rendered file that is committed can be submitted ({rule}): slurmkit render … --out X.sbatch, "
                "commit it with the X.json beside it, slurmkit submit X.sbatch"
            )
        script = checked_script(settled.spec, settled.templates)
    client = connect()
    patience = Patience(retry_for, lambda line: click.echo(line, err=True))
    if dry_run:
        ready = queue.check(settled, script, client, patience)
        click.echo(script, nl=False)
        _forecast(settled.spec, ready, err=True)
        click.echo(
            f"dry run: nothing submitted, nothing written; the run directory would be {settled.spec.run_dir}",
            err=True,
        )
        return
    if bool(settled.spec.secrets) and patience.ask(client.keeps_environments):
        click.echo(
            "warning: this cluster's accounting keeps every job's environment (AccountingStoreFlags=job_env), with "
            f"{', '.join(settled.spec.secrets)}: ask your administrator who can read it, and use tokens that expire",
            err=True,
        )
    job = queue.submit(settled, script, client, patience, provenance)
    click.echo(f"job            {job.job_id}")
    _forecast(settled.spec, job.ready)
    click.echo(f"rendered file  {job.script}")
    click.echo(f"run directory  {job.run_dir}")
    log = job.run_dir / "attempts/latest/driver.log"
    click.echo(f"follow it      slurmkit logs -f {shlex.quote(str(job.run_dir))}")
    if wait and settled.spec.until_done.enabled:
        from slurmkit.cli.names import queue_here
        from slurmkit.cli.wait import until_over

        sys.exit(until_over(job.run_dir, queue_here(), click.echo).code)
    if wait:
        from rich.console import Console

        from slurmkit.report.terminal import RunProgress

        console = Console(soft_wrap=True, highlight=False, markup=False)
        with RunProgress(job.run_dir, console) as progress:
            end = queue.wait(
                client, job.job_id, lambda job: console.print(_in_words(job)), lambda: progress.update(log)
            )
        click.echo(f"job {end.job_id} ended: {end.state}, exit code {end.code}; its output is {job.output}")
        if end.signal == _NO_OUTPUT:
            click.echo(
                f"error: Slurm could not open the job's output on the node: is the run directory on a file system that "
                f"all nodes share? {job.run_dir}",
                err=True,
            )
        sys.exit(end.code)


def _forecast(spec: JobSpec, ready: queue.Ready, err: bool = False) -> None:
    for warning in ready.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"cost           {cost(spec)}", err=err)
    click.echo(f"start          {start(spec, ready.estimate)}", err=err)


def _in_words(job: JobState) -> str:
    why = f" ({job.reason})" if job.state == "PENDING" and job.reason not in ("", "None") else ""
    where = f" on {job.nodes}" if job.nodes not in ("", "(null)") else ""
    return f"job {job.job_id} is {job.state}{why}{where}"
