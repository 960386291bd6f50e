"""The same run without Slurm: this machine is the one node, and the driver brings up a Ray of its own."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from slurmkit.errors import INTERRUPTED, UserError
from slurmkit.job.settle import Settled
from slurmkit.run import leftovers
from slurmkit.run.directory import RunDirectory, files_of, write_json
from slurmkit.run.leftovers import end_run, find, own_mark, supervisor_is_gone
from slurmkit.slurm.command import active_jobs, without_outer_run

# Seconds between two looks at the driver.
_POLL = 0.5
# How long it may take to leave when asked: the trainer finishes a step and saves, anything else has less to do.
_GRACE_OF_TRAINER, _GRACE = 1800.0, 15.0
# And when asked again.
_AT_ONCE = 2.0
# Seconds to wait for the processes of a killed run: its guard takes up to 6 s to end them (run/leftovers.py).
_PATIENCE, _LOOK_EVERY = 60.0, 0.5


def run_here(
    settled: Settled,
    secrets: Mapping[str, str],
    tell: Callable[[Path], None],
    say: Callable[[str], None],
) -> int:
    """Run the command as a child until it ends, `secrets` in its environment.

    Call `tell` with the driver's log while the command runs, and `say` with remarks. Return the command's exit code, or
    128 + the signal that was sent here if the command did not say that it saved. Wait first for the processes of a
    killed `slurmkit run` in the same directory. UserError if the directory is another run's, or if another process
    is still at work in it.
    """
    spec = settled.spec
    directory = RunDirectory(Path(spec.run_dir))
    directory.refuse_other(settled)
    os.umask(int(spec.umask, 8))
    directory.prepare(files_of(settled))
    with _alone_in(directory.path, say) as lock:
        _remark_leftovers(say)
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
            with _guarded(lock) as guard:
                code = _supervise(settled, secrets, attempt, asked, guard, tell, say)
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
    guard: int,
    tell: Callable[[Path], None],
    say: Callable[[str], None],
) -> int:
    spec, log, mark = settled.spec, attempt / "driver.log", own_mark()
    script = "\n".join(["set -euo pipefail", *spec.setup, 'exec -- "$@"'])
    environment = {
        **without_outer_run(os.environ),
        "PATH": f"{os.path.dirname(spec.python)}:{os.environ.get('PATH', os.defpath)}",
        **spec.env,
        **secrets,
        "SK_MARK": mark,
        "SK_OUTER_JOB": os.environ.get("SLURM_JOB_ID", ""),
        "SK_ATTEMPT_DIR": str(attempt),
    }
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    # What the command is told when it is asked to leave is its own business: a signal to all of its group would take
    # the trainer's actors away while it saves with them.
    child, answered, until, grace = None, 0, math.inf, _GRACE if spec.config is None else _GRACE_OF_TRAINER
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
        os.write(guard, b"%d" % child.pid)
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
        with suppress(OSError):
            tell(log)
        return code if code >= 0 else 128 - code
    finally:
        # Its Ray, and whatever else it started: nothing outlives the process that watches it.
        end_run(mark, child.pid if child else None)


def _farewell(number: int, config: str | None, grace: float) -> str:
    does = "to leave" if config is None else "to finish or drop its step, save and leave"
    again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
    return f"interrupted: the command is asked {does}, and has {grace / 60:g} min for it{again}"


def _link_latest(attempt: Path) -> None:
    beside = attempt.with_name(f".latest.{attempt.name}")
    beside.symlink_to(attempt.name)
    os.replace(beside, attempt.with_name("latest"))


@contextmanager
def _guarded(lock: TextIO) -> Iterator[int]:
    """Run a guard that ends this run's processes if this process is killed.

    The guard has a session of its own, so that no signal to our process group or terminal reaches it. It reads the
    command's session from the pipe that is yielded, until the pipe ends: no other process has this end of it open. The
    guard keeps the directory locked until it is done.
    """
    inherited, ours = os.pipe()
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", leftovers.__file__, own_mark(), str(inherited)],
            # Without the mark of a run around this one, whose end would end the guard first.
            env={name: value for name, value in os.environ.items() if name != "SK_MARK"},
            pass_fds=(inherited, lock.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        os.close(inherited)
    try:
        yield ours
    finally:
        guard.kill()
        guard.wait()
        os.close(ours)


@contextmanager
def _alone_in(path: Path, say: Callable[[str], None]) -> Iterator[TextIO]:
    """Lock a run directory and yield the lock file, which holds the mark of the process that has the lock."""
    with (path / "attempts" / ".lock").open("a+") as lock:
        _wait_until_free(path, lock, say)
        lock.truncate(0)
        lock.write(own_mark())
        lock.flush()
        yield lock


def _wait_until_free(path: Path, lock: TextIO, say: Callable[[str], None]) -> None:
    """Take the lock and wait until no process of a dead run is at work here. UserError after the deadline."""
    until, said = time.monotonic() + _PATIENCE, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except OSError:
            is_locked = False
            lock.seek(0)
            if not supervisor_is_gone(lock.read()):
                raise UserError(f"{path}: another slurmkit run is at work here; give this one another --name") from None
        left = [process for process in find(active_jobs).processes if process.run == str(path)]
        if is_locked and not left:
            return
        names = ", ".join(f"{process.what} ({process.pid})" for process in left) or "its guard"
        if time.monotonic() > until:
            raise UserError(
                f"{path}: processes of a run that was killed are still at work here after {_PATIENCE:g} s: {names}. "
                "End them: slurmkit cleanup"
            )
        if not said:
            say(f"the last attempt was killed: waiting up to {_PATIENCE:g} s until its processes have ended")
            said = True
        time.sleep(_LOOK_EVERY)


def _remark_leftovers(say: Callable[[str], None]) -> None:
    left = find(active_jobs)
    if left.processes or left.paths:
        what = f"{len(left.processes)} processes, {len(left.paths)} files and folders"
        say(f"note: dead runs of yours left {what} on this machine: slurmkit cleanup")
