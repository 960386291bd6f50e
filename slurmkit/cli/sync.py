"""slurmkit sync"""

from __future__ import annotations

from pathlib import Path

import click

from slurmkit.cli.names import queue_here, runs_argument, states_of
from slurmkit.errors import UserError
from slurmkit.run.offline import offline_runs, upload


@click.command("sync")
@runs_argument(required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded, and upload nothing.")
def command(runs: tuple[Path, ...], dry_run: bool) -> None:
    """Upload what runs have logged for W&B offline: all attempts of a run, in order, to one run of W&B.

    What is uploaded already is left out. Takes wandb, and WANDB_API_KEY or what `wandb login` has kept.
    """
    runs = tuple(dict.fromkeys(runs))
    for state in states_of(runs, queue_here()):
        if state.state in ("starting", "running"):
            raise UserError(
                f"{state.name} is {state.state}, and what it logs is not whole: upload it when it has ended"
            )
    found = [each for run in runs for each in offline_runs(run)]
    due = [each for each in found if each.is_due]
    for each in found:
        if each.is_empty:
            click.echo(f"left out {each.file.parent}: its attempt was killed before W&B wrote anything")
    for each in due:
        verb = "would upload" if dry_run else "uploads"
        click.echo(f"{verb} {each.file.parent} ({each.num_bytes / 1e6:.1f} MB) to the run {each.id}")
    if before := sum(each.is_uploaded for each in found):
        click.echo(f"{before} uploaded before")
    if due and not dry_run:
        upload(due)
