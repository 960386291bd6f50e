"""slurmkit site lint, slurmkit site init"""

from __future__ import annotations

from pathlib import Path

import click

from slurmkit.errors import UserError


@click.group("site")
def command() -> None:
    """Write and check the file that holds a site's defaults and rules."""


@command.command("lint")
@click.argument("file", type=click.Path(path_type=Path))
def lint(file: Path) -> None:
    """Check a site's file alone: its keys, its defaults against its own rules, its patterns, its templates' folder."""
    from slurmkit.job.site import read_site

    site = read_site(file)
    if site.templates is not None and not site.templates.is_dir():
        raise UserError(f"templates: {site.templates}: no such folder ({site.place('templates')})")
    rules = site.rules
    every = [rules, *rules.partitions.values()]
    click.echo(
        f"{file}: good; {len(rules.partitions)} partitions, {sum(len(part.defaults) for part in every)} defaults, "
        f"{sum(len(part.lock) for part in every)} locked, {sum(len(part.require) for part in every)} required, "
        f"{sum(len(part.limits) for part in every)} limited"
    )


@command.command("init")
@click.option("--out", type=click.Path(path_type=Path), help="Write the file here instead of printing it.")
def init(out: Path | None) -> None:
    """Draft a site's file from what the cluster says: its partitions, limits, GPUs, and whether pyxis is there."""
    from slurmkit.job.draft import draft
    from slurmkit.run.directory import write_beside
    from slurmkit.slurm.command import has_pyxis
    from slurmkit.slurm.connect import connect

    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists already; slurmkit does not write over a site's file")
    text = draft(connect().partitions(), has_pyxis())
    if out is None:
        click.echo(text, nl=False)
    else:
        write_beside(out, text)
        click.echo(f"wrote {out}; edit it, then: slurmkit site lint {out}", err=True)
