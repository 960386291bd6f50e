"""The same run without Slurm: this machine is the one node, and the driver brings up a Ray of its own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from slurmkit.errors import UserError
from slurmkit.job.settle import Settled
from slurmkit.run.directory import RunDirectory

# Seconds between two calls of `tell`, and how long the driver may take to leave when asked to.
_POLL = 0.5
_GRACE = 15.0


def run_here(settled: Settled, secrets: Mapping[str, str], tell: Callable[[Path], None]) -> int:
    """Run the command as a child until it ends, `secrets` in its environment.

    `tell` is called with the driver's log while it works. Returns the command's exit code. On an interrupt the child is
    asked to leave, then made to.
    """
    spec = settled.spec
    directory = RunDirectory(Path(spec.run_dir))
    directory.refuse_other(settled)
    os.umask(int(spec.umask, 8))
    directory.prepare({} if spec.config is None else {"config.yaml": spec.config})
    with _alone_in(directory.path):
        name = f"local-{len(directory.attempts) + 1}"
        attempt = directory.path / "attempts" / name
        attempt.mkdir()
        directory.add_attempt(settled.identity, {"local": name})
        _link_latest(attempt)
        return _supervise(settled, secrets, attempt / "driver.log", tell)


def _supervise(settled: Settled, secrets: Mapping[str, str], log: Path, tell: Callable[[Path], None]) -> int:
    spec = settled.spec
    script = "\n".join(["set -euo pipefail", *spec.setup, 'exec -- "$@"'])
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(spec.python)}:{os.environ.get('PATH', os.defpath)}",
        **spec.env,
        **secrets,
    }
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
    # As an interrupt does: the command must not outlive the one who watches it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        while True:
            tell(log)
            try:
                code = child.wait(_POLL)
                break
            except subprocess.TimeoutExpired:
                pass
    except BaseException:
        _end(child)
        raise
    tell(log)
    return code if code >= 0 else 128 - code


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the command to leave; what is left of its process group after that, or after the grace, is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)


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
