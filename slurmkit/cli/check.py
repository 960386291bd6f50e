"""slurmkit check"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slurmkit.errors import SlurmkitError, UserError
from slurmkit.job import check
from slurmkit.job.audit import read_rendered


@click.command("check")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def command(files: tuple[Path, ...]) -> None:
    """Tell whether written sbatch files are still what rendering makes of their sources.

    A folder stands for all files that slurmkit rendered below it, except those in run directories. The default is this
    folder. Exit code: 0 all are, 1 one is not, 2 one cannot be told.
    """
    paths = tuple(path for given in files or (Path(),) for path in _files_of(given))
    sys.exit(max(_report(path) for path in paths))


def _files_of(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        return (path,)
    rendered = tuple(check.rendered_below(path))
    if not rendered:
        where = "this folder" if path == Path() else str(path)
        raise UserError(f"nothing to check: there is no rendered *.sbatch below {where}")
    return rendered


def _report(path: Path) -> int:
    try:
        rendered = read_rendered(path)
        result = check.check(rendered)
    except SlurmkitError as error:
        click.echo(f"error    {path}")
        click.echo(f"error: {error}", err=True)
        return 2
    click.echo(f"{'differs' if result.problems else 'same':<9}{path}")
    for problem in result.problems:
        click.echo(f"         {problem}")
    for notice in result.notices:
        click.echo(f"         notice: {notice}, outside this repository")
    if result.diff:
        click.echo(result.diff, nl=False)
    if result.problems:
        click.echo(f"         render it again: {rendered.again}")
    return 1 if result.problems else 0
