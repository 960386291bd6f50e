"""A measurement in a fresh process: settings in, figures out, both as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from slurmkit.errors import Failure
from slurmkit.processes import end_with_parent

# A measurement that takes longer than this has hung.
DEADLINE_SECONDS = 6 * 3600.0


def measured(module: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `python -m slurmkit.bench.MODULE` says of `settings`; what it prints besides goes to stderr.

    Failure where it raised (its traceback is on stderr) or hung.
    """
    command = [sys.executable, "-m", f"slurmkit.bench.{module}"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(settings),
            stdout=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_SECONDS,
            preexec_fn=end_with_parent,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"slurmkit.bench.{module} has not ended after {DEADLINE_SECONDS:g} s") from None
    if done.returncode:
        raise Failure(f"slurmkit.bench.{module} ended with exit code {done.returncode}; settings: {dict(settings)}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side."""
    figures, sys.stdout = sys.stdout, sys.stderr
    json.dump(work(json.load(sys.stdin)), figures)
