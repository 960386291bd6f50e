"""slurmkit cancel"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slurmkit.cli.names import client_here, echo_json, json_option, runs_argument


@click.command("cancel")
@runs_argument(required=True)
@json_option
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Cancel runs: the job that runs or waits, and the follow-ups behind it.

    Exit code: 0 all have ended, 1 one is told to end and has not yet.
    """
    from slurmkit.run.cancel import cancel

    client = client_here()
    done = []
    for run in runs:
        one = cancel(run, client)
        done.append(one)
        if not as_json:
            what = " and ".join(f"job {job}" if job.isdigit() else job for job in one.jobs)
            if not one.jobs:
                words = f"has ended before: {one.state.state}"
            elif one.state.is_final:
                words = f"{one.state.state} ({what})"
            else:
                words = f"{what} told to end, and still {one.state.state}"
            click.echo(f"{one.state.name}: {words}")
    if as_json:
        echo_json([{"cancelled": list(one.jobs), **one.state.as_json()} for one in done])
    sys.exit(any(not one.state.is_final for one in done))
