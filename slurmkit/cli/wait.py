"""slurmkit wait"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slurmkit.cli.names import echo_json, json_option, queue_here, run_argument

if TYPE_CHECKING:
    from slurmkit.run.state import Queue, RunState

_POLL = 2.0
# As timeout(1) has it.
_TIMED_OUT = 124


@click.command("wait")
@run_argument
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up after that time, with exit code 124.")
@json_option
def command(run: Path, timeout: float | None, as_json: bool) -> None:
    """Wait until a run has ended for good, follow-ups included, and exit with its code.

    A cancelled run has 143, an interrupted one that nothing goes on with 85, and one without a record of its end 1.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    state = until_over(run, queue_here(), (lambda line: None) if as_json else click.echo, deadline)
    if as_json:
        echo_json(state.as_json())
    if not state.is_final:
        click.echo(f"error: {state.name} is {state.state} after {timeout:g} s", err=True)
        sys.exit(_TIMED_OUT)
    sys.exit(state.code)


def until_over(run: Path, queue: Queue, say: Callable[[str], object], deadline: float | None = None) -> RunState:
    """Wait until a run has ended for good, and return its state, or its state at the deadline (of time.monotonic).

    Calls `say` with each change of the state.
    """
    from slurmkit.run.state import followed

    said, problem = None, None
    for state, is_over in followed(run, queue):
        if queue.problem != problem:
            problem = queue.problem
            click.echo(f"warning: {problem or 'Slurm answers again'}", err=True)
        if (state.state, state.reason) != said:
            said = (state.state, state.reason)
            say(f"{state.name}: {state.state}" + (f": {state.reason}" if state.reason else ""))
        if is_over or (deadline is not None and time.monotonic() >= deadline):
            return state
        time.sleep(_POLL if deadline is None else min(_POLL, max(0.0, deadline - time.monotonic())))
    raise AssertionError("followed() ends with an end")
