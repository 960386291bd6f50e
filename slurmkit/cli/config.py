"""slurmkit config"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slurmkit.cli.names import echo_json
from slurmkit.cli.options import JobCommand, job_options, request_from
from slurmkit.config.source import leaves
from slurmkit.errors import UserError
from slurmkit.job.settle import settle

_WIDTH = 60


@click.command("config", cls=JobCommand)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, also what nobody set.")
@job_options(slurm=True)
@click.pass_context
def command(context: click.Context, /, as_json: bool, words: tuple[str, ...], **options: Any) -> None:
    """Print the settled job, and where each value comes from: a file and line, a variable, a flag, or a default."""
    request = request_from(context, words, options)._replace(partial=True)
    settled = settle(request, Path.cwd())
    if as_json:
        echo_json(settled.as_json())
        _refuse_missing(settled.missing)
        return
    for key, value in leaves(settled.spec.model_dump(mode="json", exclude={"config"})):
        if value not in (None, [], {}, False) or settled.origins.get(key, "default") != "default":
            _line(key, value, settled.origins.get(key, "default"))
    for folder in settled.templates:
        _line("templates", str(folder), "before slurmkit's own")
    if settled.train is not None:
        click.echo(f"\n# the training configuration, from {settled.origins['config']}")
        for key, value in leaves(settled.train.model_dump(mode="json")):
            _line(key, value, settled.config_origins.get(key, "default"))
    _refuse_missing(settled.missing)


def _refuse_missing(missing: tuple[str, ...]) -> None:
    if missing:
        raise UserError("\n".join(missing))


def _line(key: str, value: Any, origin: str) -> None:
    text = f"{key}: {json.dumps(value, ensure_ascii=False)}"
    click.echo(f"{text:<{_WIDTH}}  # {origin}")
