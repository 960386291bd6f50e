"""slurmkit usage"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from slurmkit.cli.names import client_here, echo_json, json_option, run_argument
from slurmkit.job.layers import site_file
from slurmkit.run.state import duration
from slurmkit.run.usage import AttemptUsage, Usage, usage_of

if TYPE_CHECKING:
    from slurmkit.job.site import Price


@click.command("usage")
@run_argument
@json_option
def command(run: Path, as_json: bool) -> None:
    """Tell what a run has used up until now, of each attempt and in sum, and what that cost.

    From Slurm's accounting where it has the jobs, otherwise from the run directory's files. `lost` is the time after an
    attempt's last finished step, and in steps that were made again.
    """
    usage, problem = usage_of(run, client_here())
    price = _price()
    cost = None
    if price is not None:
        cost = usage.gpu_hours * price.per_gpu_hour + usage.node_hours * price.per_node_hour
    if problem is not None:
        click.echo(f"warning: accounting could not be asked: {problem}", err=True)
    if as_json:
        echo_json({**usage.as_json(), "cost": cost, "currency": price and price.currency})
        return
    from slurmkit.report.table import Table

    header = ("attempt", "waited", "elapsed", "nodes", "gpus", "node-hours", "gpu-hours", "cpu", "lost", "from")
    Table(header, [*map(_row, usage.attempts), _sum(usage)]).show()
    if usage.efficiency is not None and usage.in_steps is not None:
        click.echo(
            f"efficiency     {usage.efficiency:.0%} of the time in steps that count ({duration(usage.in_steps)})"
        )
    if cost is not None and price is not None:
        click.echo(f"cost           {cost:,.2f} {price.currency}")


def _price() -> Price | None:
    path = site_file()
    if path is None:
        return None
    from slurmkit.job.site import read_site

    return read_site(path).rules.price


def _row(attempt: AttemptUsage) -> list[str]:
    return [
        attempt.name,
        _time(attempt.waited),
        duration(attempt.elapsed),
        str(attempt.nodes),
        str(attempt.gpus),
        f"{attempt.node_hours:,.2f}",
        f"{attempt.gpu_hours:,.2f}",
        "" if attempt.cpu_efficiency is None else f"{attempt.cpu_efficiency:.0%}",
        _time(attempt.lost),
        attempt.source,
    ]


def _sum(usage: Usage) -> list[str]:
    hours = [f"{usage.node_hours:,.2f}", f"{usage.gpu_hours:,.2f}"]
    return ["all", duration(usage.waited), duration(usage.elapsed), "", "", *hours, "", _time(usage.lost), ""]


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)
