"""slurmkit logs"""

from __future__ import annotations

import json
import re
import select
import sys
from contextlib import suppress
from pathlib import Path

import click

from slurmkit.cli.names import json_option, queue_here, run_argument
from slurmkit.run.logs import Reader

# Seconds between two looks at the files.
_POLL = 0.5
# What a terminal would act on: only colours (the first group) may stay. ECMA-48, 5.4 and 8.3; xterm's own end in BEL.
_CONTROL = re.compile(
    r"(\x1b\[[0-9;:]*m)"
    r"|\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b[]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0a-\x1f\x7f-\x9f]"
)


@click.command("logs")
@run_argument
@click.option("--follow", "-f", is_flag=True, help="Go on as they grow, through all attempts, until the run is over.")
@click.option("--node", metavar="NODE", help="A node's own log in place of the command's, or those of all: all.")
@click.option("--attempt", metavar="K", help="An attempt's number or job id.  [default: the newest]")
@click.option("--lines", "-n", type=click.IntRange(0), default=100, show_default=True, help="The last lines of a log.")
@click.option("--all", "whole", is_flag=True, help="All lines.")
@json_option
def command(
    run: Path, follow: bool, node: str | None, attempt: str | None, lines: int, whole: bool, as_json: bool
) -> None:
    """Show what a run's command has written, or why it has not started."""
    reader = Reader(run, queue_here(), node, attempt, None if whole else lines)
    gone = select.poll()
    gone.register(sys.stdout, 0)
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    colour = sys.stdout.isatty()

    def pause() -> None:
        if gone.poll(_POLL * 1000):
            raise BrokenPipeError

    with suppress(BrokenPipeError):  # whoever read this has seen enough
        for line in reader.lines(follow, pause):
            if as_json:
                print(json.dumps(line._asdict()))
            elif line.source == "slurmkit":
                click.echo(f"slurmkit: {line.text}", err=True)
            else:
                text = for_terminal(line.text) if colour else line.text
                print(f"{line.source}: {text}" if node == "all" else text)


def for_terminal(text: str) -> str:
    """A line without what would move the cursor, clear the screen or set a title; of a line that was written over
    again and again, as progress bars are, the last state.
    """
    text = text.rstrip("\r").rpartition("\r")[2]
    clean = _CONTROL.sub(lambda found: found[1] or "", text)
    return f"{clean}\x1b[0m" if "\x1b" in clean else clean
