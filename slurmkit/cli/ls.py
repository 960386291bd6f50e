"""slurmkit ls"""

from __future__ import annotations

from pathlib import Path

import click

from slurmkit.cli.names import echo_json, json_option, queue_here, states_of, table_of
from slurmkit.run.find import results_folder, runs_in


@click.command("ls")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@json_option
def command(folder: Path | None, as_json: bool) -> None:
    """List all runs, of ./results or of FOLDER, one line each."""
    folder = folder or results_folder(Path.cwd())
    states = states_of(runs_in(folder), queue_here())
    if as_json:
        echo_json([state.as_json() for state in states])
    elif states:
        table_of(states).show()
    else:
        click.echo(f"there is no run in {folder}", err=True)
