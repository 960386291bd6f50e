"""slurmkit report"""

from __future__ import annotations

import time
from pathlib import Path

import click

from slurmkit.cli.names import queue_here, runs_argument, states_of
from slurmkit.errors import INTERRUPTED
from slurmkit.report.page import AttemptFacts, RunFacts, write_page
from slurmkit.run.attempts import Attempt
from slurmkit.run.state import RunState, duration


@click.command("report")
@runs_argument(required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page's file: report.html in the run directory, or of several runs in this folder, if left out.",
)
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one page of a run, or of several beside each other, that opens in a browser without anything else.

    RUN is a name in ./results, the path of a run directory, or a job id. Links in the page are relative: it can be
    moved together with its runs. The page tells how the runs stand now; call it again for a newer one.
    """
    states = states_of(tuple(dict.fromkeys(runs)), queue_here())
    page = out or (states[0].path if len(states) == 1 else Path()) / "report.html"
    click.echo(write_page([_facts(state) for state in states], page).absolute())


def _facts(state: RunState) -> RunFacts:
    facts = {
        "step": "" if state.step is None else f"{state.step:,} of {state.last_step:,}",
        "left": "" if state.left is None else duration(state.left),
        "job": state.job_id or "",
        "nodes": state.nodes,
        "began": _moment(state.attempts[0].started if state.attempts else None),
        "attempts": str(len(state.attempts)),
        "newest checkpoint": state.checkpoint or "",
        "run directory": str(state.path),
        "as of": _moment(time.time()),
    }
    return RunFacts(
        name=state.name,
        path=state.path,
        state=state.state,
        reason=state.reason,
        facts={label: text for label, text in facts.items() if text},
        attempts=[_attempt(each, state) for each in state.attempts],
    )


def _attempt(attempt: Attempt, state: RunState) -> AttemptFacts:
    began, ended = attempt.started, attempt.ended
    if attempt.has_ended:
        end = attempt.reason or "the command ended"
        end += "" if attempt.code in (0, None) else f" (exit code {attempt.code})"
    else:
        end = state.state if attempt is state.attempts[-1] else "no record of its end"
    return AttemptFacts(
        name=attempt.name,
        job_id=attempt.job_id or "",
        nodes=attempt.nodes,
        started=_moment(began),
        took="" if began is None or ended is None else duration(ended - began),
        end=end,
        is_good=attempt.code in (0, INTERRUPTED) or (not attempt.has_ended and not state.is_final),
        bad_nodes=attempt.bad_nodes,
        folder=attempt.folder,
    )


def _moment(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
