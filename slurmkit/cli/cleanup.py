"""slurmkit cleanup"""

from __future__ import annotations

import sys

import click

from slurmkit.cli.names import echo_json
from slurmkit.run.forecast import duration
from slurmkit.run.leftovers import Leftovers, end, find, remove
from slurmkit.slurm.command import active_jobs


@click.command("cleanup")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; without --yes nothing is ended.")
def command(yes: bool, as_json: bool) -> None:
    """End and remove what dead runs of yours left on this machine.

    Processes of Ray, vLLM and the driver, their folders in /tmp, and shared memory that they hold. Nothing of a live
    run or job, nothing of somebody else's. Exit code: 0 nothing is left, 1 something is.
    """
    left = find(active_jobs)
    count = len(left.processes) + len(left.paths)
    if not as_json:
        _show(left)
        # In a script nobody is asked.
        yes = yes or bool(count and sys.stdin.isatty() and click.confirm("end and remove them?"))
    still = count
    if yes:
        still = end({process.mark for process in left.processes}) + remove(left.paths)
    if as_json:
        processes = [process._asdict() for process in left.processes]
        paths = [str(path) for path in left.paths]
        found = {"processes": processes, "paths": paths, "unknown": list(left.unknown), "left": still}
        echo_json(found)
    elif count:
        click.echo(f"{still} of {count} are left" + ("" if yes else ": end and remove them with --yes"))
    sys.exit(1 if still else 0)


def _show(left: Leftovers) -> None:
    for process in left.processes:
        run = process.run or f"the attempt {process.mark}"
        click.echo(f"{process.pid:<9}{process.what:<34}{duration(process.age // 60):>8} old  {run}")
    for path in left.paths:
        click.echo(str(path))
    if left.unknown:
        click.echo(
            f"left alone, as Slurm cannot be asked whether their jobs still run: {', '.join(left.unknown)}", err=True
        )
    if not left.processes and not left.paths:
        click.echo("dead runs left nothing here")
