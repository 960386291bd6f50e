"""slurmkit status"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click

from slurmkit.cli.names import echo_json, json_option, queue_here, runs_argument, states_of, table_of
from slurmkit.run.attempts import Attempt
from slurmkit.run.find import results_folder, runs_in
from slurmkit.run.state import RunState, duration

# Seconds for which an ended run is still of interest.
_DAY = 86400.0


@click.command("status")
@runs_argument(required=False)
@json_option
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Tell how runs stand: those of ./results that are active or ended within a day, or RUN… with all details.

    RUN is a name in ./results, the path of a run directory, or a job id. Where Slurm cannot be asked, or has forgotten
    the job, the run directory's files tell.
    """
    folder = results_folder(Path.cwd())
    states = states_of(runs or runs_in(folder), queue_here())
    if not runs:
        states = recent(states)
    if as_json:
        echo_json([state.as_json() for state in states])
    elif runs:
        click.echo("\n\n".join("\n".join(_details(state)) for state in states))
    elif states:
        table_of(states).show()
    else:
        click.echo(f"no run in {folder} is active or ended within a day; slurmkit ls lists all", err=True)


def recent(states: list[RunState]) -> list[RunState]:
    """Those that are active, or ended within a day."""
    since = time.time() - _DAY
    return [state for state in states if not state.is_final or (state.ended or state.path.stat().st_mtime) >= since]


def _details(state: RunState) -> Iterator[str]:
    yield _line("run", state.name)
    yield _line("state", state.state + (f": {state.reason}" if state.reason else ""))
    yield _line("run directory", str(state.path))
    if state.job_id is not None:
        where = f" on {state.nodes}" if state.nodes else ""
        behind = f", and follow-up job {state.next} in the queue" if state.next else ""
        yield _line("job", f"{state.job_id}{where}{behind}")
    if state.elapsed is not None:
        yield _line("elapsed", duration(state.elapsed) + (f" of {duration(state.limit)}" if state.limit else ""))
    if state.step is not None:
        parts = [f"{state.step}/{state.last_step}"]
        parts += [f"reward {state.reward:.3f}"] if state.reward is not None else []
        parts += [f"accuracy {state.accuracy:.3f}"] if state.accuracy is not None else []
        parts += [f"{duration(state.left)} left"] if state.left is not None else []
        yield _line("step", "  ".join(parts))
    if state.checkpoint is not None:
        yield _line("checkpoint", state.checkpoint)
    if state.is_final:
        yield _line("exit code", str(state.code))
    of = f" of {state.max_attempts} at most" if state.max_attempts else ""
    is_array = any(attempt.task is not None for attempt in state.attempts)
    yield _line("tasks" if is_array else "attempts", f"{len(state.attempts)}{of}")
    for number, attempt in enumerate(state.attempts, 1):
        key = f"[{attempt.task}]" if attempt.task is not None else number
        yield f"  {key:>3}  {_in_words(attempt, attempt is state.attempts[-1], state)}"


def _in_words(attempt: Attempt, is_last: bool, state: RunState) -> str:
    parts = [attempt.name, attempt.nodes]
    if attempt.started is not None:
        parts.append(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started)))
        parts.append(duration(attempt.ended - attempt.started) if attempt.ended is not None else "")
    if attempt.has_ended:
        end = f"exit code {attempt.code}" + (f": {attempt.reason}" if attempt.reason else "")
        end += f"; bad nodes: {', '.join(attempt.bad_nodes)}" if attempt.bad_nodes else ""
    elif attempt.task is not None:
        end = "" if state.is_final else "running"
    elif is_last:
        end = state.state + (f": {state.reason}" if state.is_final and state.reason else "")
    else:
        end = "no record of its end"
    return "  ".join(filter(None, [*parts, end]))


def _line(label: str, text: str) -> str:
    return f"{label:<15}{text}"
