"""Whether bash can parse a job's lines and its whole script, before the job waits in a queue."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from slurmkit.config.source import Source
from slurmkit.config.validate import origin_of
from slurmkit.errors import Failure, UserError
from slurmkit.job.spec import JobSpec

# The interpreter that the script's first line names.
_BASH = "/bin/bash"
# Seconds. Parsing takes milliseconds; the rest is for a login node that is overloaded.
_DEADLINE = 60


def checked_script(spec: JobSpec, folders: tuple[Path, ...]) -> str:
    """Return the rendered script. UserError if bash cannot parse it: names the template and its block."""
    from slurmkit.job.render import render  # and with it Jinja2, which settling a job does not need

    script = render(spec, folders)
    if found := fault_in(script):
        from slurmkit.job.trace import render_traced

        line, message = found
        file, block = render_traced(spec, folders).place(line)
        inside = f", block {block}" if block else ""
        raise UserError(f"{file}{inside}: bash cannot parse line {line} of the script that it renders: {message}")
    return script


def faults_in_lines(spec: JobSpec, source: Source) -> Iterator[str]:
    """Yield a message for each of prologue, setup and epilogue that bash cannot parse, with the origin."""
    for key, lines in (("prologue", spec.prologue), ("setup", spec.setup), ("epilogue", spec.epilogue)):
        # Alone: in the script a brace among them could close what surrounds them.
        found = fault_in("\n".join(lines)) if lines else None
        if found:
            at = dict(enumerate("\n".join(lines).split("\n"), 1)).get(found[0])
            origin = origin_of(source, (key,))
            where = f"{f'line {at!r}' if at else 'its end'}{f' ({origin})' if origin else ''}"
            yield f"{key}: bash cannot parse {where}: {found[1]}"


def fault_in(text: str) -> tuple[int, str] | None:
    """Return the line and message of bash's first complaint about a script, None if it has none or there is no bash.

    A here-document without an end is a warning to bash: it swallows all that follows.
    """
    try:
        done = subprocess.run(
            [_BASH, "-n"],
            input=text.encode("utf-8", "surrogateescape"),
            env={"LC_ALL": "C"},
            capture_output=True,
            timeout=_DEADLINE,
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise Failure(f"{_BASH} -n did not parse the job's script within {_DEADLINE} s: try again later") from None
    if not done.stderr:
        return None
    said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
    match = re.match(rf"{_BASH}: line (\d+): (.*)", said)
    return (int(match[1]), match[2]) if match else (1, said)
