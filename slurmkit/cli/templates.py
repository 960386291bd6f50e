"""slurmkit templates list, show, diff, check"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from slurmkit.job.settle import Request, template_folders


@click.group("templates")
def command() -> None:
    """See which templates a job is rendered from, and check those of a site or a project."""


def _of_folders(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say where the templates come from, beside the site's file and the project's."""
    function = click.option("--profile", help="As if a job were submitted with this profile.")(function)
    folder = click.Path(path_type=Path, file_okay=False, exists=True)
    return click.option("--templates", type=folder, help="This folder in place of the project's.")(function)


def _folders(profile: str | None, templates: Path | None) -> tuple[Path, ...]:
    flags = {} if templates is None else {"templates": str(templates.absolute())}
    return template_folders(Request(profile=profile, flags=flags), Path.cwd())


@command.command("list")
@_of_folders
def list_(profile: str | None, templates: Path | None) -> None:
    """Each template's name, the file that it comes from, and what that takes the place of."""
    from slurmkit.job.overrides import overview

    for name, paths in overview(_folders(profile, templates)).items():
        over = f"  over {', '.join(map(str, paths[1:]))}" if paths[1:] else ""
        click.echo(f"{name:<30}{paths[0]}{over}")


@command.command("show")
@click.argument("name")
@_of_folders
def show(name: str, profile: str | None, templates: Path | None) -> None:
    """Print a template as it stands; slurmkit/NAME is the packaged one, site/NAME the one below the strongest."""
    from slurmkit.job.overrides import source

    click.echo(source(name, _folders(profile, templates))[1], nl=False)


@command.command("diff")
@click.argument("name", required=False)
@_of_folders
def diff(name: str | None, profile: str | None, templates: Path | None) -> None:
    """What a site or a project changes: block by block where it extends ours, else the whole file."""
    from slurmkit.job.overrides import differences, overview

    folders = _folders(profile, templates)
    names = [name] if name else [name for name, paths in overview(folders).items() if paths[1:]]
    for each in names:
        click.echo(differences(each, folders), nl=False)
    if not names:
        click.echo("no template of slurmkit's is overridden", err=True)


@command.command("check")
@_of_folders
def check(profile: str | None, templates: Path | None) -> None:
    """Render a table of jobs, run bash -n and shellcheck, rehearse how a job ends. Exit 1 where something is wrong."""
    from slurmkit.job.lint import check, shellcheck, specs
    from slurmkit.job.rehearsal import ACTS
    from slurmkit.job.render import environment_for, runtimes

    folders = _folders(profile, templates)
    problems = check(folders)
    for problem in problems:
        click.echo(str(problem))
    if shellcheck() is None:
        click.echo("shellcheck is not on PATH, and did not run; bash -n did", err=True)
    jobs = len(specs(runtimes(environment_for(folders))))
    click.echo(
        f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)} in {jobs} jobs and {len(ACTS)} rehearsals "
        f"with templates from {', '.join([*map(str, folders), 'slurmkit'])}",
        err=True,
    )
    sys.exit(1 if problems else 0)
