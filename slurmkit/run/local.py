"""The same run without Slurm: this machine is the one node, and the driver brings up a Ray of its own."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from slurmkit.errors import INTERRUPTED, UserError
from slurmkit.job.settle import Settled
from slurmkit.run.directory import RunDirectory, files_of, write_json
from slurmkit.run.leftovers import Leftovers, end, own_mark

# Seconds between two looks at the driver.
_POLL = 0.5
# How long it may take to leave when asked: the trainer finishes a step and saves, anything else has less to do.
_GRACE_OF_TRAINER, _GRACE = 1800.0, 15.0
# And when asked again.
_AT_ONCE = 2.0


def run_here(
    settled: Settled,
    secrets: Mapping[str, str],
    left: Leftovers,
    tell: Callable[[Path], None],
    say: Callable[[str], None],
) -> int:
    """Run the command as a child until it ends, `secrets` in its environment.

    `tell` is called with the driver's log while it works, `say` with what a signal sets going. Returns the command's
    exit code, or 128 + the signal that was sent here where the command did not say that it saved. UserError where the
    directory is another run's, or where another process, perhaps one of those in `left`, is at work in it.
    """
    spec = settled.spec
    directory = RunDirectory(Path(spec.run_dir))
    directory.refuse_other(settled)
    if any(process.run == spec.run_dir for process in left.processes):
        raise UserError(f"{spec.run_dir}: processes that a dead run left are at work here; end them: slurmkit cleanup")
    os.umask(int(spec.umask, 8))
    directory.prepare(files_of(settled))
    with _alone_in(directory.path):
        attempt = directory.path / "attempts" / f"local-{len(directory.attempts) + 1}"
        attempt.mkdir()
        directory.add_attempt(settled.identity, {"local": attempt.name})
        # Somebody asked for each one anew: none is a follow-up of the one before it.
        start = {"local": attempt.name, "attempt": 1, "pid": os.getpid(), "nodes": socket.gethostname()}
        write_json(attempt / "start.json", {**start, "started": int(time.time()), "previous": None})
        _link_latest(attempt)
        asked: list[int] = []  # the signals that came
        code = 1
        try:
            code = _supervise(settled, secrets, attempt, asked, tell, say)
            if asked and code not in (0, INTERRUPTED):
                code = 128 + asked[0]
        finally:
            cancelled = bool(asked) and code not in (0, INTERRUPTED)
            facts = {"code": code, "reason": _reason(code, cancelled), "ended": int(time.time())}
            write_json(attempt / "end.json", {**facts, "bad_nodes": [], "goes_on": False, "cancelled": cancelled})
        return code


def _reason(code: int, cancelled: bool) -> str:
    if cancelled:
        return f"cancelled with {signal.Signals(code - 128).name}"
    words = {
        0: "the command is done",
        75: "Ray or one of its processes failed",
        INTERRUPTED: "interrupted in order",
    }
    return words.get(code, f"the command failed with exit code {code}")


def _supervise(
    settled: Settled,
    secrets: Mapping[str, str],
    attempt: Path,
    asked: list[int],
    tell: Callable[[Path], None],
    say: Callable[[str], None],
) -> int:
    spec, log, mark = settled.spec, attempt / "driver.log", own_mark()
    script = "\n".join(["set -euo pipefail", *spec.setup, 'exec -- "$@"'])
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(spec.python)}:{os.environ.get('PATH', os.defpath)}",
        **spec.env,
        **secrets,
        "SK_MARK": mark,
        "SK_ATTEMPT_DIR": str(attempt),
    }
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    # What the command is told when it is asked to leave is its own business: a signal to all of its group would take
    # the trainer's actors away while it saves with them.
    answered, until, grace = 0, math.inf, _GRACE if spec.config is None else _GRACE_OF_TRAINER
    try:
        with log.open("wb") as output:
            child = subprocess.Popen(
                ["bash", "-c", script, "slurmkit-run", *spec.command],
                cwd=spec.workdir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while True:
            with suppress(OSError):  # the terminal may be gone, and the command is to be asked to leave, not killed
                tell(log)
            try:
                code = child.wait(_POLL)
                break
            except subprocess.TimeoutExpired:
                pass
            if len(asked) > answered:
                again, answered = answered > 0, len(asked)
                until = min(until, time.monotonic() + (_AT_ONCE if again else grace))
                child.terminate()
                with suppress(OSError):
                    say("interrupted again: the command is ended" if again else _farewell(asked[0], spec.config, grace))
            if time.monotonic() > until:
                child.kill()
        tell(log)
        return code if code >= 0 else 128 - code
    finally:
        end({mark})  # its Ray, and whatever else it started: nothing outlives the one who watches it


def _farewell(number: int, config: str | None, grace: float) -> str:
    does = "to leave" if config is None else "to finish or drop its step, save and leave"
    again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
    return f"interrupted: the command is asked {does}, and has {grace / 60:g} min for it{again}"


def _link_latest(attempt: Path) -> None:
    beside = attempt.with_name(f".latest.{attempt.name}")
    beside.symlink_to(attempt.name)
    os.replace(beside, attempt.with_name("latest"))


@contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    with (path / "attempts" / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another slurmkit run is at work here; give this one another --name") from None
        yield
