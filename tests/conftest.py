"""Shared fixtures: one real Slurm for the session, a folder that its nodes share, and one finished run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cluster import Cluster, development_cluster
from tests.support.driver import EVERY_STEP, TINY, Run, run
from tests.support.requirements import unchanged_environment

if TYPE_CHECKING:
    from tests.support.containers import Machines


# The lane of every test that asks for such a fixture; other tests say theirs by a mark.
_LANES = {"cluster": "slurm", "machines": "slurm", "finished": "ray", "whole": "ray", "browser": "browser"}


def pytest_configure(config: pytest.Config) -> None:
    """Select the lane unit if pytest is started without a path and without a mark."""
    if config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.markexpr:
        config.option.markexpr = "unit"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its lanes, `unit` if it has no other."""
    lanes = {"ray", "slurm", "vllm", "browser", "faults", "model", "nightly"}
    for item in items:
        for fixture in _LANES.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(_LANES[fixture])
        if not lanes.intersection(mark.name for mark in item.iter_markers()):
            item.add_marker("unit")


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
    from tests.support.containers import container_machines

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
