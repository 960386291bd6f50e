"""slurmkit watch"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slurmkit.cli.names import queue_here, run_argument
from slurmkit.run.state import duration, followed

_EVERY = 2.0


@click.command("watch")
@run_argument
def command(run: Path) -> None:
    """Watch one run until it has ended for good, follow-ups included, and exit with its code, as `wait` does.

    Shows its step, the curves of its reward and accuracy, the phases of its steps and the time left; in a pipe, lines.
    q or Ctrl-C leave (0 and 130) and do nothing to the run.
    """
    from rich.console import Console

    from slurmkit.report.table import keys
    from slurmkit.report.terminal import RunProgress

    console = Console(highlight=False)
    log, said = run / "attempts/latest/driver.log", ""
    with RunProgress(run, console, whole=True) as progress, keys() as pressed:
        for state, is_over in followed(run, queue_here()):
            words = f"{state.name}: {state.state}" + (f": {state.reason}" if state.reason else "")
            if not console.is_terminal and words != said:
                said = words
                click.echo(words)
            elapsed = f"  {duration(state.elapsed)}" if state.elapsed is not None else ""
            progress.update(log, f"{words}  {state.nodes}{elapsed}".rstrip())
            if is_over or pressed(_EVERY):
                break
    if console.is_terminal:  # what was drawn is gone
        console.print(progress.drawn(log, words))
    sys.exit(state.code if is_over else 0)
