"""The arguments that name runs, with completion, and what the commands that look at runs share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from slurmkit.errors import SlurmkitError
from slurmkit.run.directory import jobs_of
from slurmkit.run.find import find_job, find_run, results_folder, runs_in

if TYPE_CHECKING:
    from slurmkit.report.table import Table
    from slurmkit.run.state import Queue, RunState
    from slurmkit.slurm.client import SlurmClient

Function = TypeVar("Function", bound=Callable[..., Any])


class RunType(click.ParamType):  # type: ignore[type-arg] # generic in newer releases of click only
    """RUN: a name in the results folder, a path of a run directory, or a job id. Becomes the run directory's path."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """UserError with the nearest names where there is no such run."""
        return value if isinstance(value, Path) else find_run(value, results_folder(Path.cwd()))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names, newest first, and job ids once a digit is typed; from files alone."""
        if "/" in incomplete:
            return [CompletionItem(incomplete, type="dir")]
        try:
            runs = runs_in(results_folder(Path.cwd()))
        except SlurmkitError:
            return []
        runs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        found = [CompletionItem(path.name) for path in runs if path.name.startswith(incomplete)]
        if incomplete.isdigit():
            jobs = [(job_id, path.name) for path in runs for job_id in jobs_of(path) if job_id.startswith(incomplete)]
            found += [CompletionItem(job_id, help=name) for job_id, name in sorted(jobs, key=lambda job: -int(job[0]))]
        return found


class JobType(click.ParamType):  # type: ignore[type-arg] # generic in newer releases of click only
    """RUN as for RunType, but converted to a job id: the id itself, or the id of the run's newest job."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the job id. UserError if the text is neither a run nor a job id."""
        return find_job(value, results_folder(Path.cwd()))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete as RunType does."""
        return RunType().shell_complete(ctx, param, incomplete)


def run_argument(function: Function) -> Function:
    """RUN, exactly one, as `run`."""
    return click.argument("run", type=RunType())(function)


def runs_argument(required: bool) -> Callable[[Function], Function]:
    """RUN…, as `runs`."""
    return click.argument(
        "runs", nargs=-1, type=RunType(), metavar="RUN..." if required else "[RUN...]", required=required
    )


def json_option(function: Function) -> Function:
    """--json, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def client_here() -> SlurmClient | None:
    """The way to Slurm, where there is a Slurm."""
    if shutil.which("sbatch") is None:
        return None
    from slurmkit.slurm.connect import connect

    return connect()


def queue_here() -> Queue:
    """Slurm's queue where there is a Slurm; one that is never asked where there is none."""
    from slurmkit.run.state import Queue

    return Queue(client_here())


def states_of(runs: Sequence[Path], queue: Queue) -> list[RunState]:
    """The states of these runs; a warning where Slurm could not be asked."""
    from slurmkit.run.state import read_states

    states = read_states(runs, queue)
    if queue.problem is not None:
        click.echo(f"warning: Slurm could not be asked, so this is what the files tell: {queue.problem}", err=True)
    return states


def table_of(states: Sequence[RunState]) -> Table:
    """One row per run."""
    from slurmkit.report.table import Table

    header = ("run", "state", "job", "nodes", "elapsed", "step", "reward", "accuracy", "left", "why")
    return Table(header, [_row(state) for state in states])


def _row(state: RunState) -> list[str]:
    from slurmkit.run.state import duration

    elapsed = "" if state.elapsed is None else duration(state.elapsed)
    if elapsed and state.limit is not None and not state.is_final:
        elapsed += f"/{duration(state.limit)}"
    return [
        state.name,
        state.state,
        state.job_id or "",
        state.nodes,
        elapsed,
        "" if state.step is None else f"{state.step}/{state.last_step}",
        "" if state.reward is None else f"{state.reward:.3f}",
        "" if state.accuracy is None else f"{state.accuracy:.3f}",
        "" if state.left is None else duration(state.left),
        state.reason,
    ]


def echo_json(value: Any) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
