"""The programs of benchmarks/: what they share with the nodes, and when they refuse a ratio."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.requirements import REPOSITORY, SLURMKIT, need_slurm


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = ("_faults", "bringup", "launcher", "faults")
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        for name in names:
            sys.modules.pop(name, None)


def test_an_environment_in_tmp_is_shared_with_the_nodes(
    programs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs["_faults"], "REPOSITORY", Path("/tmp/clone"))
    monkeypatch.setattr(sys, "prefix", "/tmp/environment")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert programs["_faults"].shared_folders() == [Path("/tmp/clone"), Path("/tmp/environment")]


def test_a_python_without_slurmkit_is_refused_before_a_cluster_is_started(
    programs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(programs["_faults"], "SLURMKIT", tmp_path / "slurmkit")
    with pytest.raises(SystemExit, match=f"there is no {tmp_path}/slurmkit. Start this program with the Python"):
        programs["bringup"].cluster_of(1, "bench").__enter__()


@pytest.mark.slurm
@pytest.mark.nightly
def test_bringup_works_from_a_clone_and_an_environment_in_tmp() -> None:
    need_slurm()
    folder = Path(tempfile.mkdtemp(prefix="slurmkit clone ", dir="/tmp"))
    try:
        for name in ("benchmarks", "scripts", "slurmkit", "templates"):
            shutil.copytree(REPOSITORY / name, folder / "clone" / name)
        (folder / "clone/slurmkit/templates").symlink_to(folder / "clone/templates")  # as setup.cfg maps the package
        # Another environment with the packages of this one, and slurmkit of the clone.
        venv.create(folder / "environment", with_pip=False, symlinks=True)
        python = folder / "environment/bin/python"
        packages = folder / "environment" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        (packages / "others.pth").write_text(f"{folder}/clone\n{sysconfig.get_path('purelib')}\n")
        for program in (SLURMKIT, SLURMKIT.with_name("ray")):
            _, _, code = program.read_text().partition("\n")
            (python.parent / program.name).write_text(f"#!/bin/sh\n'''exec' '{python}' \"$0\" \"$@\"\n' '''\n{code}")
            (python.parent / program.name).chmod(0o755)
        words = ["benchmarks/bringup.py", "--nodes", "1", "--repeat", "1", "--out", folder / "figures.json"]
        environment = {**os.environ, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(
            [python, *words], cwd=folder / "clone", env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (row,) = json.loads((folder / "figures.json").read_text())["rows"]
        assert row["nodes"] == 1
        assert row["ratio"]["n"] == 1
    finally:
        shutil.rmtree(folder)


def test_a_bringup_with_other_nodes_than_the_job_s_gets_no_ratio(programs: dict[str, ModuleType]) -> None:
    row_of, line_of = programs["bringup"].row_of, programs["bringup"].line_of
    ours, bare = [(4.0, 1.0, 2), (6.0, 1.0, 2)], [(2.0, 2), (4.0, 2)]
    row = row_of(2, ours, bare)
    assert row["ratio"] == {"median": 1.75, "least": 1.5, "most": 2.0, "n": 2}
    assert "1.75 (1.50–2.00)" in line_of(row)
    row = row_of(2, ours, [(2.0, 2), (4.0, 1)])
    assert "ratio" not in row
    assert row["unequal"] == (
        "nodes of Ray in a job of 2: slurmkit had 2, slurmkit had 2, bare Ray had 2, bare Ray had 1"
    )
    assert "unequal" in line_of(row)


def test_a_submission_that_queued_other_than_one_job_of_one_node_is_told(
    programs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`queue` stands for Slurm's: a line with the number of nodes of each job."""
    for name, line in {"squeue": "cat queue", "scancel": ": >queue"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd '{tmp_path}'\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "queue").touch()
    rows = {
        "slurmkit render": lambda: ["true"],
        "slurmkit submit": lambda: ["sh", "-c", "echo 1 >>queue"],
        "torchx": lambda: ["sh", "-c", "printf '1\\n2\\n' >>queue"],
        "submitit": lambda: ["true"],
    }
    taken, unequal = programs["launcher"].in_turns(rows, 2, tmp_path)
    assert {name: len(each) for name, each in taken.items()} == dict.fromkeys(rows, 2)
    assert unequal == {
        "torchx": ["queued 2 jobs of 1, 2 nodes"] * 3,
        "submitit": ["queued 0 jobs of  nodes"] * 3,
    }


def test_the_seconds_after_a_fault_have_their_spread(programs: dict[str, ModuleType]) -> None:
    shown = programs["faults"].shown
    assert shown([]) == "–"
    assert shown([2.0]) == "2"
    assert shown([3.0, 1.04, 20.0]) == "3 (1.04–20)"
