"""Development clusters: a real Slurm of several nodes on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.requirements import REPOSITORY, SLURMKIT, need_slurm
from tests.support.stub_ray import make_stub_ray

# Seconds between two signs of life of a node: half of what is in use. A loaded machine must not miss four in a row.
HEARTBEAT = "1"
DEVCLUSTER = REPOSITORY / "scripts" / "devcluster"


@dataclass(frozen=True)
class Cluster:
    """A development cluster, and slurmkit as its user calls it."""

    name: str
    configuration: str
    stub_python: str
    """The Python of jobs in which `ray start` starts a stub: see stub_ray.py."""

    @property
    def environment(self) -> dict[str, str]:
        slurmkit = {"SLURMKIT_HEARTBEAT": HEARTBEAT, "SLURMKIT_PYTHON": self.stub_python}
        return {**os.environ, "SLURM_CONF": self.configuration, **slurmkit}

    def slurmkit(
        self, here: Path, *arguments: str | Path, timeout: float = 300, ray: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run slurmkit. The jobs that it submits have a real Ray if the test is about `ray`, and else a stub."""
        inherited = self.environment
        if ray:
            del inherited["SLURMKIT_PYTHON"]
        return subprocess.run(
            [SLURMKIT, *arguments],
            cwd=here,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def ask(self, *command: str) -> str:
        """Run one of Slurm's own commands."""
        done = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True, timeout=60)
        return done.stdout

    def ended(self, job_id: str) -> str:
        """A job's state and exit code, as accounting has them: it may learn of the end later than squeue does."""
        deadline = time.monotonic() + 60
        while True:
            found = self.ask("sacct", "-X", "-n", "-P", "-o", "End,State,ExitCode", "-j", job_id).strip()
            if found and all(not line.startswith("Unknown|") for line in found.splitlines()):
                return found.partition("|")[2]
            assert time.monotonic() < deadline, f"job {job_id} has not ended in accounting: {found}"
            time.sleep(0.2)

    def on_node(self, node: str, *command: str, input: str = "") -> str:
        """Run a command on a node, beside Slurm."""
        done = subprocess.run(
            [DEVCLUSTER, "exec", "--name", self.name, node, *command],
            input=input,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout


@contextmanager
def development_cluster(name: str, *arguments: str | Path) -> Iterator[Cluster]:
    """A cluster of its own, for a test that needs another configuration; gone afterwards."""
    need_slurm()
    # Of /tmp a node sees only its own; a checkout or an environment that lies there must be shared.
    shared = [path for path in {REPOSITORY, Path(sys.prefix)} if path.is_relative_to("/tmp")]
    options = [word for path in shared for word in ("--shared", str(path))]
    subprocess.run([DEVCLUSTER, "up", "--name", name, *arguments, *options], check=True, timeout=120)
    stub = Path(tempfile.mkdtemp(prefix="slurmkit-stub-", dir="/var/tmp"))
    try:
        line = subprocess.run([DEVCLUSTER, "env", "--name", name], check=True, capture_output=True, text=True).stdout
        yield Cluster(name, line.partition("SLURM_CONF=")[2].strip(), str(make_stub_ray(stub)))
    finally:
        shutil.rmtree(stub)
        subprocess.run([DEVCLUSTER, "down", "--name", name], check=True, timeout=120)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until the condition holds. Fail after `seconds` with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
