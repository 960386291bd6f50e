"""slurmkit attach"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slurmkit.cli.names import run_argument
from slurmkit.run.attach import attach, find_target
from slurmkit.slurm.connect import connect


@click.command("attach", options_metavar="[--node NODE]")
@run_argument
@click.option("--node", metavar="NODE", help="A node of the job.  [default: its first, where the command runs]")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def command(run: Path, node: str | None, words: tuple[str, ...]) -> None:
    """Open a shell inside a running job, or run a command there: in its container, with its command's environment.

    Exit code: the shell's or the command's.
    """
    attach(find_target(run, node, connect()), words or ("bash",), terminal=sys.stdin.isatty())
