"""slurmkit data"""

from __future__ import annotations

import json
from typing import Any

import click

from slurmkit.errors import UserError
from slurmkit.processes import become

_PATH = click.Path(path_type=str)
_COUNT = click.IntRange(min=1)


@click.group("data")
def command() -> None:
    """Make tasks to train on."""


@command.command("workplace")
@click.option("--tasks", type=_COUNT, required=True, metavar="N", help="Tasks to make.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which: the same, the same bytes.")
@click.option("--out", type=_PATH, required=True, metavar="FILE", help="Write them here, NeMo Gym's JSONL.")
@click.option("--validation", type=_PATH, metavar="FILE", help="Write other tasks here, for validation.")
@click.option("--validation-tasks", type=_COUNT, default=100, show_default=True, metavar="N", help="So many.")
@click.option("--world-seed", type=click.IntRange(0), default=0, show_default=True, help="env.workplace.world_seed.")
@click.option("--families", metavar="NAME,NAME", help="Kinds of tasks.  [default: all]")
@click.option("--few-tools", is_flag=True, help="Only the tools that a task needs, without words: for small models.")
@click.option("--databases", type=_PATH, metavar="FOLDER", help="Write the company's databases here as well.")
def workplace(families: str | None, **options: Any) -> None:
    """Make tasks of the Workplace Assistant over a made-up company, and check that each can be done."""
    if options["validation"] is not None and options["validation"] == options["out"]:
        raise UserError(f"--validation {options['validation']} is --out as well: name another file")
    options["families"] = families.split(",") if families else None
    # In this process's place, as environments are the trainer's.
    become("slurmkit.envs.workplace.generate", json.dumps(options))
