"""slurmkit wait"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from slurmkit.cli.names import echo_json, json_option, queue_here, run_argument

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
    from slurmkit.run.state import followed

    queue = queue_here()
    deadline = None if timeout is None else time.monotonic() + timeout
    said, problem = None, None
    for state, is_over in followed(run, queue):
        if queue.problem != problem:
            problem = queue.problem
            click.echo(f"warning: {problem or 'Slurm answers again'}", err=True)
        if not as_json and (state.state, state.reason) != said:
            said = (state.state, state.reason)
            click.echo(f"{state.name}: {state.state}" + (f": {state.reason}" if state.reason else ""))
        if is_over:
            if as_json:
                echo_json(state.as_json())
            sys.exit(state.code)
        if deadline is not None and time.monotonic() >= deadline:
            if as_json:
                echo_json(state.as_json())
            click.echo(f"error: {state.name} is {state.state} after {timeout:g} s", err=True)
            sys.exit(_TIMED_OUT)
        left = _POLL if deadline is None else min(_POLL, max(0.0, deadline - time.monotonic()))
        time.sleep(left)
