"""The child process that pyslurm lives in, with tiny modules in pyslurm's place: what goes wrong there ends there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from slurmkit.errors import Failure, UserError
from slurmkit.slurm import command, native
from slurmkit.slurm.client import Gres, Node
from slurmkit.slurm.command import CommandClient
from slurmkit.slurm.connect import connect
from tests.support.cluster import Cluster

# As much of pyslurm as nodes() and cancel() need; {version} is the Slurm's that is installed.
HEALTHY = """
import os, sys, time
print("libslurm says something on stdout")
os.system("echo and so does a child")
open({log!r}, "a").write(f"{{os.getpid()}} ")
__version__ = "{version}"
class PyslurmError(Exception): pass
class RPCError(PyslurmError): pass
class Node:
    name, state, total_cpus, allocated_cpus, real_memory = "fake", "ALLOCATED", 8, 4, 100
    configured_gres, available_features, partitions = {{"gpu:h100": 4, "shard": 2}}, ["x"], ["p", "a"]
class Nodes:
    @staticmethod
    def load():
        {load}
        return {{"fake": Node}}
class Job:
    def __init__(self, job_id): self.id = job_id
    def cancel(self): raise RPCError(f"Access denied for {{self.id}}")
"""
FAKE = Node("fake", "MIXED", 8, 100, (Gres("gpu", "h100", 4), Gres("shard", "", 2)), ("x",), ("a", "p"))


@pytest.fixture
def stand_in(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """stand_in(source): what `import pyslurm` finds in the child. Returns the file where HEALTHY notes its process."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SLURM_CONF", cluster.configuration)
    monkeypatch.setattr(native, "_noticed", False)
    major, minor = command.release()

    def write(source: str, load: str = "pass", version: str = f"{major}.{minor}.3") -> Path:
        log = folder / "log"
        (folder / "pyslurm.py").write_text(source.format(log=str(log), load=load, version=version))
        return log

    return write


def children() -> list[psutil.Process]:
    """Those that ask pyslurm; other tests of the session may have left processes of other kinds."""
    ours = psutil.Process().children(recursive=True)
    living = [child for child in ours if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if any(word.endswith("/serve.py") for word in child.cmdline())]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os._exit(1)", "its process ended with 1;"),
        (
            "import os; os.write(2, b'x\\nslurm: fatal: no slurm.conf\\n'); os._exit(1)",
            "1: slurm: fatal: no slurm.conf;",
        ),
        ("import os; os.abort()", "its process ended with -6"),
        ("raise ModuleNotFoundError('No module\\nnamed pyslurm')", "named pyslurm"),
        ("__version__ = '25.11.2'", "pyslurm 25.11.2 is not made for Slurm 22.05;"),
        ("__version__ = ''", "is not made for Slurm"),
        ("import time; time.sleep(600)", "it gave no answer within 1 s;"),
        ("x = 1", "has no attribute '__version__'"),
    ],
)
def test_failed_pyslurm_import_logs_one_line_and_falls_back_to_commands(
    stand_in: Callable[..., Path],
    source: str,
    reason: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "sleep" in source:
        monkeypatch.setattr(native, "START", 1)
    stand_in(source)
    client, other = connect("pyslurm"), connect("pyslurm")
    for each in (client, client, other):
        assert [node.name for node in each.nodes()] == ["node1", "node2", "node3", "node4"]
        assert each.partitions() == CommandClient().partitions()
        assert each.jobs(["4711"]) == ()
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("notice: pyslurm is not used: ")
    assert said.err.endswith("; Slurm's own commands are used instead\n")
    assert reason in said.err
    assert children() == []


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        ("os._exit(3)", "its process ended with 3"),
        ("time.sleep(600)", "it gave no answer within 1 s"),
        ("Nodes.gone", "it failed at nodes: AttributeError"),
        ("return {'fake': type('N', (Node,), {'total_cpus': 8, 'real_memory': None})}", "int() argument must be"),
    ],
)
def test_failed_pyslurm_call_logs_one_line_and_falls_back_to_commands(
    stand_in: Callable[..., Path],
    load: str,
    reason: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "sleep" in load:
        monkeypatch.setattr(native, "DEADLINE", 1)
    stand_in(HEALTHY, load=load)
    client = connect("pyslurm")
    assert [client.nodes(), client.nodes()] == [CommandClient().nodes()] * 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert reason in said
    assert children() == []


def test_pyslurm_runs_in_one_child_and_survives_its_output_and_refusals(
    stand_in: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    log = stand_in(HEALTHY)
    client = connect("pyslurm")
    assert not log.exists(), "nothing is started before it is needed"
    assert client.nodes() == client.nodes() == (FAKE,)
    with pytest.raises(Failure, match="Access denied for 12"):
        client.cancel("12")
    assert client.nodes() == (FAKE,), "a refusal is no reason to give up"
    assert "pyslurm" not in sys.modules
    (process,) = log.read_text().split()
    assert int(process) != os.getpid()
    assert capfd.readouterr() == ("", "")
    del client
    assert not psutil.pid_exists(int(process)), "the child ends with the client"


def test_after_an_interrupted_call_the_next_gets_its_own_answer(
    stand_in: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    once = tmp_path / "once"
    stand_in(HEALTHY, load=f"if not os.path.exists({str(once)!r}): open({str(once)!r}, 'w'); time.sleep(600)")
    client = connect("pyslurm")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(KeyboardInterrupt):
            client.nodes()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    once.touch()
    assert client.nodes() == (FAKE,)
    assert capfd.readouterr().err == ""


def test_missing_interpreter_or_cluster_choice_falls_back_to_commands(
    stand_in: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(HEALTHY)
    with monkeypatch.context() as patch:
        patch.setenv("SLURMKIT_PYSLURM_PYTHON", "/no/such/python")
        assert connect("pyslurm").nodes() == CommandClient().nodes()
    assert "/no/such/python does not start: No such file or directory" in capfd.readouterr().err
    monkeypatch.setattr(native, "_noticed", False)
    monkeypatch.setenv("SLURM_CLUSTERS", Path(os.environ["SLURM_CONF"]).parent.parent.name.removeprefix("slurmkit-"))
    assert [node.name for node in connect("pyslurm").nodes()] == ["node1", "node2", "node3", "node4"]
    assert "SLURM_CLUSTERS is set" in capfd.readouterr().err


def test_what_the_child_imports_is_not_taken_from_the_working_directory(
    stand_in: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(HEALTHY)
    (tmp_path / "json.py").write_text("import os; os._exit(9)")
    monkeypatch.chdir(tmp_path)
    assert connect("pyslurm").nodes() == (FAKE,)


def test_submission_never_starts_pyslurm(stand_in: Callable[..., Path], shared_path: Path) -> None:
    log = stand_in(HEALTHY)
    client = connect("pyslurm")
    script = shared_path / "job.sh"
    script.write_text("#!/bin/sh\n#SBATCH --output=/dev/null --hold\ntrue\n")
    assert client.test(script.read_text()).partition == "batch"
    job_id = client.submit(script)
    assert client.script_of(job_id) == script.read_bytes()
    assert not log.exists()
    CommandClient().cancel(job_id)


def test_nobody_gets_pyslurm_without_asking(stand_in: Callable[..., Path]) -> None:
    stand_in("import os; os._exit(1)")
    started = time.monotonic()
    assert isinstance(connect(), CommandClient)
    assert isinstance(connect("command"), CommandClient)
    assert time.monotonic() - started < 60
    with pytest.raises(UserError, match="'rest' is no way to reach Slurm: it is command or pyslurm"):
        connect("rest")
