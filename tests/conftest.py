"""Shared fixtures: one real Slurm for the session, a folder that its nodes share, and one finished run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driver import EVERY_STEP, TINY, Run, run
from parts import REPOSITORY, SLURMKIT, need_slurm, unchanged_environment

if TYPE_CHECKING:
    from containers import Machines

_DEVCLUSTER = REPOSITORY / "scripts" / "devcluster"


@dataclass(frozen=True)
class Cluster:
    """A development cluster of four nodes, and slurmkit as its user calls it."""

    name: str
    configuration: str

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": self.configuration}

    def slurmkit(
        self, here: Path, *arguments: str | Path, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SLURMKIT, *arguments],
            cwd=here,
            env={**self.environment, **environment},
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
            [_DEVCLUSTER, "exec", "--name", self.name, node, *command],
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
    subprocess.run([_DEVCLUSTER, "up", "--name", name, *arguments, *options], check=True, timeout=120)
    try:
        line = subprocess.run([_DEVCLUSTER, "env", "--name", name], check=True, capture_output=True, text=True).stdout
        yield Cluster(name, line.partition("SLURM_CONF=")[2].strip())
    finally:
        subprocess.run([_DEVCLUSTER, "down", "--name", name], check=True, timeout=120)


@pytest.fixture(scope="module", autouse=True)
def environment_of_other_modules() -> Iterator[None]:
    """Jobs that later tests submit get this process's environment, as from a user's shell: it stays as it was.

    The first fixture of a module that is set up is the last that is taken down.
    """
    with unchanged_environment():
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with development_cluster(f"session{os.getpid()}", "--nodes", "4") as session:
        yield session


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a space in its name."""
    directory = tmp_path / "a folder"
    directory.mkdir()
    return directory


@pytest.fixture
def shared_path() -> Iterator[Path]:
    """A folder with a space in its name that all nodes see."""
    path = Path(tempfile.mkdtemp(prefix="slurmkit test ", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    from containers import container_machines

    with container_machines() as two:
        yield two


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight steps, each saved and kept, with everything logged that can be, for tests of what a run leaves."""
    logged = ("logger.tensorboard_enabled=true", "cluster.peak_tflops_per_gpu=0.1")
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = run(folder, TINY, *EVERY_STEP, "checkpointing.save_period=1", *logged, timeout=550)
    assert done.code == 0, done.errors
    return done
