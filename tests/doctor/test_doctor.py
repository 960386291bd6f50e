"""`slurmkit doctor` on this machine and on real Slurm nodes, healthy ones and ones that were made ill."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slurmkit.doctor.finding import Checks, Finding, Subject, ask
from tests.support.cluster import Cluster, development_cluster, wait_until
from tests.support.requirements import REPOSITORY, SLURMKIT, missing, need_slurm

Findings = dict[str, dict[str, str]]
SUBJECT = Subject(sys.executable, "/", "none", None, on_node=False)


def by_what(findings: list[dict[str, str]]) -> Findings:
    return {finding["what"]: finding for finding in findings}


def on_nodes(cluster: Cluster, here: Path, *options: str, **environment: str) -> dict[str, Findings]:
    done = cluster.slurmkit(here, "doctor", "--json", *options, **environment)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    failed = any(one["result"] == "fail" for findings in answer["nodes"].values() for one in findings)
    assert done.returncode == failed == (not answer["ok"])
    assert list(here.glob(".slurmkit-doctor-*")) == []
    return {name: by_what(findings) for name, findings in answer["nodes"].items()}


def here(directory: Path, *arguments: str, **environment: str) -> tuple[int, Findings]:
    done = subprocess.run(
        [SLURMKIT, "doctor", "--json", *arguments],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout, done.stderr
    return done.returncode, by_what(json.loads(done.stdout)["checks"])


# ---- this machine


def test_a_login_node_is_told_one_line_per_check_without_colours_in_a_pipe(cluster: Cluster, shared_path: Path) -> None:
    done = cluster.slurmkit(shared_path, "doctor")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    assert "\x1b" not in done.stdout
    for line in (
        "ok    controller         answers in ",
        "ok    partitions         batch* 4 nodes up, ",
        "ok    accounting         sacct answers",
        f"warn  results directory  {shared_path}: ",
        "ok    ray                2.",
    ):
        assert any(seen.startswith(line) for seen in lines), (line, lines)
    assert all("  -> " in line for line in lines if line.startswith("warn"))
    assert list(shared_path.iterdir()) == []


def test_a_terminal_gets_colours_unless_it_wants_none(tmp_path: Path) -> None:
    command = ["script", "-qec", f"{shlex.quote(str(SLURMKIT))} doctor", "/dev/null"]
    if shutil.which("script") is None:
        missing("needs script(1) for a terminal")
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
        )
        assert ("\x1b[32mok" in done.stdout) == coloured, done.stdout


def test_a_machine_without_slurm_can_still_train_by_itself(tmp_path: Path) -> None:
    for program in ("getent", "bash"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    path = f"{tmp_path}:{SLURMKIT.parent}"
    code, seen = here(tmp_path, PATH=path)
    assert code == 0, seen
    assert seen["Slurm commands"]["found"] == "no Slurm here"
    assert not seen.keys() & {"controller", "partitions", "accounting"}
    done = subprocess.run(
        [SLURMKIT, "doctor", "--nodes", "2"], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: srun is not on PATH: --nodes asks Slurm for nodes")


def test_a_half_installed_slurm_fails_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "sbatch").symlink_to("/bin/true")
    code, seen = here(tmp_path, PATH=f"{tmp_path}:{SLURMKIT.parent}")
    assert code == 1
    assert seen["Slurm commands"]["found"] == "srun, squeue, sinfo, scontrol, scancel not on PATH"


def test_a_controller_that_does_not_answer_fails(cluster: Cluster, shared_path: Path, tmp_path: Path) -> None:
    lines = Path(cluster.configuration).read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("SlurmctldPort=", "MessageTimeout="))]
    configuration = tmp_path / "slurm.conf"
    configuration.write_text("\n".join([*kept, "SlurmctldPort=9", "MessageTimeout=2", ""]))
    code, seen = here(shared_path, SLURM_CONF=str(configuration))
    assert code == 1
    assert "Unable to contact slurm controller" in seen["controller"]["found"]
    assert f"SLURM_CONF: {configuration}" in seen["controller"]["advice"]
    assert not seen.keys() & {"partitions", "accounting"}, "what cannot be known is not said"
    done = cluster.slurmkit(shared_path, "doctor", "-N", "2", SLURM_CONF=str(configuration))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Slurm does not answer: ")


def test_a_partition_that_is_not_there_or_down_fails(cluster: Cluster, shared_path: Path) -> None:
    code, seen = here(shared_path, "--partition", "nowhere", **cluster.environment)
    assert (code, seen["partitions"]["result"]) == (1, "fail")
    assert seen["partitions"]["found"].startswith("no partition nowhere; there are batch* 4 nodes up")
    cluster.ask("scontrol", "update", "PartitionName=high", "State=DOWN")
    try:
        code, seen = here(shared_path, "--partition", "high", **cluster.environment)
    finally:
        cluster.ask("scontrol", "update", "PartitionName=high", "State=UP")
    assert (code, seen["partitions"]["result"]) == (1, "fail")
    assert seen["partitions"]["found"].startswith("no node of high is up")


def test_a_read_only_results_directory_fails(tmp_path: Path) -> None:
    need_slurm()  # root, and unshare
    read_only = (
        'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" doctor --json --results-dir "$1/x"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", read_only, "sh", tmp_path, SLURMKIT],
        capture_output=True,
        text=True,
        timeout=60,
    )
    seen = by_what(json.loads(done.stdout)["checks"])
    assert done.returncode == 1
    assert seen["results directory"]["found"] == f"{tmp_path}: Read-only file system"


def test_an_interpreter_without_ray_or_none_at_all_fails(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    (tmp_path / "slurmkit.yaml").write_text("python: bare/bin/python\n")
    code, seen = here(tmp_path)
    assert (code, seen["ray"]["result"]) == (1, "fail")
    assert seen["job's Python"]["result"] != "fail"
    assert seen["ray"]["found"] == "ModuleNotFoundError: No module named 'ray'"
    code, seen = here(tmp_path, "--set", "python=/nowhere/python")
    assert (code, seen["job's Python"]["found"]) == (1, "/nowhere/python: /nowhere/python: No such file or directory")


def test_low_limits_are_told_with_their_numbers(tmp_path: Path) -> None:
    limited = f'ulimit -Sn 1000; ulimit -Hn 3000; ulimit -u 2000; exec "{SLURMKIT}" doctor --json'
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    seen = by_what(json.loads(done.stdout)["checks"])
    assert done.returncode == 1
    assert (seen["open files"]["result"], seen["processes"]["result"]) == ("fail", "warn")
    assert seen["open files"]["found"] == "limit 1000, which a job raises to 3000"
    assert seen["processes"]["found"] == "limit 2000 (hard 2000)"


def test_a_broken_check_is_a_warning_and_the_others_go_on() -> None:
    checks = Checks()

    @checks("strange")
    def _(_: Subject) -> Finding:
        raise OSError("no /proc")

    checks("sound")(lambda _: Finding("ok", "fine"))
    checks("not for this machine")(lambda _: None)
    assert [(one.what, one.result, one.found) for one in checks.run(SUBJECT)] == [
        ("strange", "warn", "cannot be checked here: no /proc"),
        ("sound", "ok", "fine"),
    ]


def test_a_command_that_hangs_is_given_up_and_so_is_its_child() -> None:
    start, child = time.monotonic(), f"sleep {10**6 + os.getpid()}"
    done = ask("bash", "-c", f"{child} & wait", seconds=0.5)
    assert (done.returncode, done.stderr) == (124, "bash gave no answer within 0.5 s")
    assert time.monotonic() - start < 20
    wait_until(lambda: child not in subprocess.check_output(["ps", "-eo", "args"], text=True), "it has ended")


# ---- nodes


def test_healthy_nodes_are_counted_and_leave_no_job_and_no_file(cluster: Cluster, shared_path: Path) -> None:
    done = cluster.slurmkit(shared_path, "doctor", "--nodes", "4", "--partition", "high")
    assert done.returncode == 0, done.stdout
    for line in (
        "ok    clocks             ok on 4 nodes: within 1 s of the other nodes",
        f"ok    shared directory   ok on 4 nodes: {shared_path} shows the files of all nodes",
        "ok    network            ok on 4 nodes: each node is reached by the others",
        "ok    ray                ok on 4 nodes: 2.",
    ):
        assert line in done.stdout
    assert list(shared_path.iterdir()) == []
    recorded = "sacct", "-X", "-n", "-P", "-o", "JobName,Partition,NNodes,State"
    wait_until(lambda: "slurmkit-doctor|high|4|COMPLETED" in cluster.ask(*recorded).split(), "it is accounted for")


def test_gpus_that_slurm_allocated_and_nobody_sees_fail(cluster: Cluster, shared_path: Path) -> None:
    seen = on_nodes(cluster, shared_path, "-N", "1", "--gres", "gpu:h100:2")["node1"]["GPUs"]
    assert (seen["result"], seen["found"].partition(" (")[0]) == ("fail", "2 allocated, 0 seen")
    # There is no GPU here: an nvidia-smi that prints what a real one does stands in for two.
    (shared_path / "bin").mkdir()
    program = shared_path / "bin/nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86.15'\necho 'NVIDIA H100 80GB HBM3, 570.86.15'\n")
    program.chmod(0o755)
    path = f"{shared_path}/bin:{os.environ['PATH']}"
    two = on_nodes(cluster, shared_path, "-N", "1", "--gres", "gpu:h100:2", PATH=path)["node1"]["GPUs"]
    assert two["found"] == "2 × NVIDIA H100 80GB HBM3, driver 570.86.15, 2 of them allocated here"
    three = on_nodes(cluster, shared_path, "-N", "1", "--gres", "gpu:h100:3", PATH=path)["node1"]["GPUs"]
    assert (three["result"], three["found"]) == ("fail", "3 allocated, 2 seen")


def test_a_directory_that_nodes_do_not_share_fails_on_each(cluster: Cluster, shared_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as private:
        seen = on_nodes(cluster, shared_path, "-N", "2", "--results-dir", private)
    for node in ("node1", "node2"):
        assert seen[node]["shared directory"]["result"] == "fail"
        assert "No such file or directory" in seen[node]["shared directory"]["found"]


@contextmanager
def made_ill(cluster: Cluster, node: str, begin: str, end: str) -> Iterator[None]:
    cluster.on_node(node, "sh", "-c", begin)
    try:
        yield
    finally:
        cluster.on_node(node, "sh", "-c", end)


def test_a_node_that_lost_the_shared_file_system_is_named_alone(cluster: Cluster, shared_path: Path) -> None:
    mounted = f"'{shared_path}'"
    # An empty directory in the place of the mount: what an automounter leaves.
    with made_ill(cluster, "node2", f"mount -t tmpfs tmpfs {mounted}", f"umount {mounted}"):
        seen = on_nodes(cluster, shared_path, "-N", "2")
    assert seen["node2"]["shared directory"]["found"].endswith("cannot be written: No such file or directory")
    assert seen["node1"]["shared directory"]["result"] == "ok"


def test_two_nodes_that_cannot_reach_each_other_are_named(cluster: Cluster, shared_path: Path) -> None:
    address = cluster.on_node("node3", "hostname", "-I").split()[0]
    route = f"ip route add unreachable {address}", f"ip route del unreachable {address}"
    with made_ill(cluster, "node2", *route):
        done = cluster.slurmkit(shared_path, "doctor", "-N", "4")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if " network " in line)
    # Packets of node3 reach node2, the answers do not come back.
    assert f"fail on node2: node3 ({address}) not reached: No route to host; fail on node3: node2 (" in line
    assert "not reached: timed out; ok on 2 nodes  -> look for a firewall" in line


def test_doctor_fails_a_node_without_slurmkit_and_checks_the_others(cluster: Cluster, shared_path: Path) -> None:
    hidden = f"'{Path(sys.executable).parent}'"
    with made_ill(cluster, "node2", f"mount -t tmpfs tmpfs {hidden}", f"umount {hidden}"):
        seen = on_nodes(cluster, shared_path, "-N", "2")
    assert seen["node2"]["report"]["result"] == "fail"
    assert "execve(): " in seen["node2"]["report"]["found"]
    assert seen["node1"]["ray"]["result"] == "ok"


def test_a_clock_that_is_off_fails_on_that_node(cluster: Cluster, shared_path: Path) -> None:
    # All virtual nodes have this machine's one clock, so Python's is shifted on one of them.
    (shared_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "real, shift = time.time, {'node2': -5.0, 'node3': 1.5}.get(os.environ.get('SLURMD_NODENAME'), 0.0)\n"
        "time.time = lambda: real() + shift\n"
    )
    seen = on_nodes(cluster, shared_path, "-N", "4", PYTHONPATH=str(shared_path))
    results = {name: findings["clocks"]["result"] for name, findings in seen.items()}
    assert results == {"node1": "ok", "node2": "fail", "node3": "warn", "node4": "ok"}
    assert seen["node2"]["clocks"]["found"].endswith(" s behind the other nodes")
    assert seen["node2"]["clock"]["result"] == "fail", "the file system's clock is the right one"


def test_nodes_with_different_versions_of_ray_fail(cluster: Cluster, shared_path: Path) -> None:
    other = shared_path / "other/ray"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("__version__ = '2.1.0'\n")
    (shared_path / "ray").symlink_to(SLURMKIT.with_name("ray"))
    python = shared_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" != node2 ] || export PYTHONPATH="{other.parent}"\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    done = cluster.slurmkit(shared_path, "doctor", "-N", "3", "--set", f"python={python}")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("fail  ray "))
    assert "fail on node1, node3: 2." in line
    assert line.endswith("; fail on node2: 2.1.0  -> must be the same on all nodes")


def test_doctor_finds_leftovers_of_dead_jobs_and_ignores_live_jobs(cluster: Cluster, shared_path: Path) -> None:
    # devcluster exec waits for the command's output to close, so the living job's process has none.
    begin = (
        "mkdir /tmp/sk-999999.0 /tmp/sk-888888.0; head -c 3145728 /dev/zero >/dev/shm/old; echo >/dev/shm/lock;"
        "SK_MARK=888888.0 sleep 60 <>/dev/null >&0 2>&0 & echo $! >/tmp/pid"
    )
    end = "kill $(cat /tmp/pid); rm -r /tmp/sk-999999.0 /tmp/sk-888888.0 /dev/shm/old /dev/shm/lock /tmp/pid"
    with made_ill(cluster, "node1", begin, end):
        seen = on_nodes(cluster, shared_path, "-N", "1", "--set", "nodelist=node1")["node1"]["leftovers"]
    assert seen["result"] == "warn"
    assert seen["found"].startswith("/dev/shm/old, /tmp/sk-999999.0: used by no job or process; 0.00 GiB")


@pytest.mark.slurm
def test_a_node_with_little_shared_memory_and_a_small_tmp_is_warned_about(shared_path: Path) -> None:
    sizes = ["--shm-size", "64m", "--tmp-size", "100m"]
    with development_cluster(f"small{os.getpid()}", "--nodes", "1", "--no-accounting", *sizes) as small:
        seen = on_nodes(small, shared_path, "-N", "1")["node1"]
        login = here(shared_path, **small.environment)[1]
    assert (seen["/dev/shm"]["result"], seen["/dev/shm"]["found"]) == ("warn", "0.06 of 0.06 GiB free")
    assert (seen["/tmp"]["result"], seen["/tmp"]["found"]) == ("warn", "0.10 of 0.10 GiB free (tmpfs)")
    assert (login["accounting"]["result"], login["controller"]["result"]) == ("warn", "ok")


@pytest.fixture
def busy(cluster: Cluster) -> Iterator[None]:
    """All nodes taken by somebody's job."""
    job = cluster.ask("sbatch", "--parsable", "-N4", "--exclusive", "--output=/dev/null", "--wrap=sleep 300").strip()
    wait_until(lambda: "RUNNING" in cluster.ask("squeue", "-h", "-j", job, "-o", "%T"), "it runs")
    yield
    cluster.ask("scancel", job)
    wait_until(lambda: not cluster.ask("squeue", "-h", "-j", job), "it has ended")


def requests(cluster: Cluster) -> str:
    return cluster.ask("squeue", "-h", "-n", "slurmkit-doctor")


def test_nodes_that_are_not_free_are_waited_for_no_longer_than_asked(
    cluster: Cluster, shared_path: Path, busy: None
) -> None:
    done = cluster.slurmkit(shared_path, "doctor", "-N", "2", "--immediate", "3")
    assert (done.returncode, done.stdout) == (1, "")
    assert "2 nodes were not free within 3 s (Slurm says: Resources); the request was taken back" in done.stderr
    assert requests(cluster) == ""
    assert list(shared_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_doctor_takes_its_request_back(
    cluster: Cluster, shared_path: Path, busy: None, number: int, code: int
) -> None:
    command = [SLURMKIT, "doctor", "-N", "2"]
    waiting = subprocess.Popen(command, cwd=shared_path, env=cluster.environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: requests(cluster), "it is in the queue")
    waiting.send_signal(number)
    assert waiting.wait(30) == code
    wait_until(lambda: not requests(cluster), "the request is taken back", 20)
    assert list(shared_path.iterdir()) == []


def test_doctor_in_an_allocation_checks_its_nodes_despite_running_steps(cluster: Cluster, shared_path: Path) -> None:
    script = (
        "srun --exact sleep 300 & until squeue -s -h -j $SLURM_JOB_ID | grep -q sleep; do sleep 0.1; done\n"
        '"$1" doctor --json -N 2; kill %1'
    )
    done = subprocess.run(
        ["salloc", "-Q", "-N", "2", "--nodelist=node[2-3]", "bash", "-mc", script, "bash", SLURMKIT],
        cwd=shared_path, env=cluster.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert list(json.loads(done.stdout)["nodes"]) == ["node2", "node3"], done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--nodes", "0"], "nodes: should be greater than or equal to 1, not 0"),
        (["--nodes", "2", "--partition", "nowhere"], "Slurm would not give these nodes: invalid partition specified"),
        (["--nodes", "1", "--gres", "gpu:tpu:1"], "Requested node configuration is not available"),
        (["--nodes", "1", "--results-dir", "/proc"], "/proc cannot be written: "),
        (["--nodes", "1", "--immediate", "0"], "--immediate"),
        (["no.yaml"], "no.yaml"),
    ],
)
def test_a_bad_request_is_one_message_and_exit_code_2(
    cluster: Cluster, shared_path: Path, options: list[str], reason: str
) -> None:
    done = cluster.slurmkit(shared_path, "doctor", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert list(shared_path.iterdir()) == []


def test_what_runs_on_nodes_needs_only_the_standard_library() -> None:
    environment: dict[str, Any] = {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-S", "-c", "import slurmkit.doctor.node"], env=environment, check=True, timeout=60)
