"""slurmkit top"""

from __future__ import annotations

import time
from pathlib import Path

import click

from slurmkit.cli.names import echo_json, json_option, queue_here, table_of
from slurmkit.cli.status import recent
from slurmkit.report.table import Table, watch
from slurmkit.run.find import results_folder, runs_in
from slurmkit.run.state import RunState, read_states

_EVERY = 2.0


@click.command("top")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option("--once", is_flag=True, help="Look once, and leave.")
@json_option
def command(folder: Path | None, once: bool, as_json: bool) -> None:
    """Watch all runs of ./results, or of FOLDER, that are active or ended within a day, until q or Ctrl-C.

    Looks every 2 s, with one question to Slurm. In a pipe the lines are printed each time.
    """
    results = folder or results_folder(Path.cwd())
    queue = queue_here()

    def states_now() -> list[RunState]:
        return recent(read_states(runs_in(results), queue))

    def look() -> tuple[Table, str]:
        states = states_now()
        active = sum(not state.is_final for state in states)
        below = f"{time.strftime('%H:%M:%S')}  {active} active, {len(states) - active} ended within a day"
        return table_of(states), below + (f"  Slurm could not be asked: {queue.problem}" if queue.problem else "")

    while as_json or once:
        if as_json:
            echo_json([state.as_json() for state in states_now()])
        else:
            table, below = look()
            table.show()
            click.echo(below)
        if once:
            return
        time.sleep(_EVERY)
    watch(look, _EVERY)
