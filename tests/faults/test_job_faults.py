"""What a job does when a node, Ray, the driver or Slurm fails under it, on a real Slurm: how soon, and in which words.

FAULTS_REPEAT=3 runs each of them three times. The times that are told are measured, and not asserted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slurmkit.job.keeper_file import keeper_text, name_of_keeper
from slurmkit.job.render import render
from slurmkit.job.spec import JobSpec, RayOptions, UntilDone
from tests.support.cluster import DEVCLUSTER, HEARTBEAT, Cluster, development_cluster, wait_until

BEAT = float(HEARTBEAT)
REPEAT = range(int(os.environ.get("FAULTS_REPEAT", "1")))
pytestmark = [pytest.mark.slurm, pytest.mark.faults, pytest.mark.parametrize("run", REPEAT)]
# Makes steps until `last`, and on USR2 saves where it stands; a next attempt goes on from there.
DRIVER = """
import signal, sys, time
from pathlib import Path
saved = Path("saved")
step = int(saved.read_text()) if saved.exists() else 0
def save(*_):
    time.sleep(0.5)
    saved.write_text(str(step))
    print("interrupted after step", step, flush=True)
    sys.exit(85)
signal.signal(signal.SIGUSR2, save)
print("goes on after step", step, flush=True)
Path("up").touch()
while not Path("enough").exists():
    time.sleep(0.1)
    step += 1
    if Path("lost").exists():
        sys.exit(75)
print("complete", flush=True)
"""
HANG = """
import os, time, ray
from pathlib import Path
ray.init(log_to_driver=False)
@ray.remote(num_cpus=0, resources={f"node:{os.environ['ELSEWHERE']}": 0.01})
class Actor:
    def sleeps_for_ever(self, up):
        Path(up).touch()
        time.sleep(3600)
actor = Actor.remote()
hanging = actor.sleeps_for_ever.remote(os.path.abspath("up"))
ray.get(hanging)
"""
# Has an actor on another node, and does not catch what happens to that.
STEPS = """
import os, time, ray
from pathlib import Path
ray.init(log_to_driver=False)
@ray.remote(num_cpus=0, resources={f"node:{os.environ['ELSEWHERE']}": 0.01})
class Actor:
    def step(self):
        return 1
actor = Actor.remote()
ray.get(actor.step.remote())
Path("up").touch()
while not Path("enough").exists():
    time.sleep(0.2)
    ray.get(actor.step.remote())
"""
ELSEWHERE = 'read -r _ ELSEWHERE _ <"$SK_MEET/ready.1"; export ELSEWHERE; exec python "$@"\n'
EAT = """
import ray
ray.init(log_to_driver=False)
@ray.remote(max_retries=0)
def eat():
    import time
    full = [bytearray(b"x" * (16 << 20)) for _ in range(64)]
    time.sleep(60)
ray.get(eat.remote())
"""


@dataclass
class Job:
    """A job of this module's cluster, and what it has left so far."""

    cluster: Cluster
    here: Path
    job_id: str

    @property
    def run_dir(self) -> Path:
        return self.here / "results/x"

    def attempt(self, job_id: str = "") -> Path:
        return self.run_dir / f"attempts/{job_id or self.job_id}.0"

    def end(self, job_id: str = "", seconds: float = 90) -> dict[str, Any]:
        """What end.json says, as soon as it is there."""
        path = self.attempt(job_id) / "end.json"
        wait_until(path.exists, f"{path}", seconds)
        return dict(json.loads(path.read_text()))

    def next(self, job_id: str = "") -> str:
        path = self.attempt(job_id) / "next"
        wait_until(path.exists, f"{path}", 30)
        return path.read_text().strip()

    def output(self, job_id: str = "") -> str:
        return (self.run_dir / f"slurm-{job_id or self.job_id}.out").read_text()

    def log(self, job_id: str = "") -> str:
        return (self.attempt(job_id) / "driver.log").read_text()

    def is_up(self, job_id: str = "") -> None:
        """Wait until the driver works, and forget that it did."""
        up, end = self.here / "up", self.attempt(job_id) / "end.json"
        wait_until(lambda: up.exists() or end.exists(), "the driver works", 180)
        assert up.exists(), self.output(job_id)
        up.unlink()

    def state(self, job_id: str = "") -> str:
        return self.cluster.ask("squeue", "-h", "-t", "all", "-o", "%T", "-j", job_id or self.job_id).strip()

    def is_over(self, job_id: str = "") -> None:
        wait_until(lambda: self.state(job_id) not in ("PENDING", "RUNNING", "COMPLETING"), "the job is over", 120)


@pytest.fixture(scope="module")
def small() -> Iterator[Path]:
    """Make a file system of 100 MB. The nodes see what is mounted when they start."""
    path = Path(tempfile.mkdtemp(prefix="slurmkit small ", dir="/var/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)
    path.rmdir()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Iterator[Cluster]:
    conf = tmp_path_factory.mktemp("conf") / "site.conf"
    conf.write_text("SlurmdTimeout=300\nPartitionName=graceful Nodes=ALL PriorityTier=10 GraceTime=20 State=UP\n")
    with development_cluster(f"f{os.getpid()}", "--nodes", "3", "--conf", conf) as cluster:
        yield cluster


@pytest.fixture
def here(machines: Cluster) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="slurmkit test ", dir="/var/tmp"))
    for name, text in (("driver.py", DRIVER), ("hang.py", HANG), ("eat.py", EAT), ("steps.py", STEPS)):
        (path / name).write_text(text)
    nodes_are_idle(machines)
    yield path
    machines.ask("scancel", "--user", "root")
    wait_until(lambda: machines.ask("squeue", "-h").strip() == "", "no job is left", 120)
    shutil.rmtree(path)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Show a measured time, whatever pytest captures."""
    plugins = request.config.pluginmanager
    reporter, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")

    def write(what: str, seconds: float) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"\n    {what}: {seconds:.1f} s")

    return write


def submit(
    cluster: Cluster, here: Path, *options: str, nodes: int = 2, job: str = "", command: Sequence[str] = ("driver.py",),
    ray: bool = False, **environ: str,
) -> Job:  # fmt: skip
    (here / "job.yaml").write_text(
        f"name: x\nnodes: {nodes}\ntime: 10\nray: {{num_cpus: 1, object_store_memory: 100000000}}\n{job}"
    )
    words = command if len(command) > 1 else (sys.executable, *command)
    done = cluster.slurmkit(here, "submit", "job.yaml", *options, "--", *words, ray=ray, **environ)
    found = re.search(r"^job +(\d+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return Job(cluster, here, found[1])


def machine(cluster: Cluster, command: str, node: str) -> None:
    """Kill or start a node, as scripts/devcluster does."""
    subprocess.run([DEVCLUSTER, command, "--name", cluster.name, node], check=True, timeout=120)
    if command == "start-node":
        end_completing(cluster, node)


def end_completing(cluster: Cluster, node: str) -> None:
    """Make slurmctld give up the jobs that a node has lost, for which it would wait for a minute."""
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    cluster.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
    nodes_are_idle(cluster)


def nodes_are_idle(cluster: Cluster) -> None:
    """Wait until jobs may run on all nodes: `idle*` is a node that does not answer."""
    wait_until(lambda: set(cluster.ask("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, "all nodes are idle", 120)


def kill_raylet(cluster: Cluster, node: str) -> None:
    cluster.on_node(node, "sh", "-c", "kill -9 $(ps -eo pid,comm | awk '$2 == \"raylet\" {print $1}')")


def ends_in(cluster: Cluster, job: Job, seconds: int) -> None:
    """Move a running job's time limit to so many seconds from now."""
    cluster.ask("scontrol", "update", f"JobId={job.job_id}", f"EndTime=now+{seconds}")


def left_of(cluster: Cluster, node: str, attempt: str) -> str:
    """What one attempt left there; the follow-up may be there already."""
    search = f"grep -lsz -x SK_MARK={attempt} /proc/[0-9]*/environ; ls -d /tmp/sk-{attempt} 2>/dev/null; true"
    return cluster.on_node(node, "sh", "-c", search)


def left_on(cluster: Cluster, node: str) -> list[str]:
    processes = cluster.on_node(node, "ps", "-eo", "args").splitlines()
    files = cluster.on_node(node, "sh", "-c", "ls -d /tmp/sk-* 2>/dev/null").splitlines()
    return [line for line in processes if "raylet" in line or "gcs_server" in line or "driver.py" in line] + files


def test_a_node_that_dies_during_bring_up_ends_the_job_and_is_named(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    setup = "setup: ['[[ $SLURM_NODEID == 0 ]] || { touch up; exec sleep 300; }']\n"
    job = submit(machines, here, job=setup)
    job.is_up()
    began = time.time()
    machine(machines, "kill-node", "node2")
    end = job.end()
    tell("node dead in bring-up, until the job's end is written", end["ended"] - began)
    try:
        assert (end["code"], end["bad_nodes"]) == (75, ["node2"])
        assert f"node node2: no sign of life for {4 * BEAT:g} s; the end of " in job.output()
        assert "node 1 of 2: node2" in job.output(), "the tail of its log"
        assert end["ended"] - began < 30
        wait_until(lambda: left_on(machines, "node1") == [], "all is down", 10)
    finally:
        machine(machines, "start-node", "node2")


def test_a_ray_that_dies_during_bring_up_ends_the_job(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    setup = "setup: ['[[ $SLURM_NODEID == 0 ]] || { touch up; exec sleep 300; }']\n"
    job = submit(machines, here, job=setup)
    wait_until((job.attempt() / "bringup/head").exists, "the head's Ray is up")
    began = time.time()
    kill_raylet(machines, "node1")
    end = job.end()
    tell("Ray dead in bring-up, until the job's end is written", end["ended"] - began)
    assert (end["code"], end["bad_nodes"]) == (75, ["node1"])
    assert "node node1: its raylet died" in job.output()


@pytest.mark.parametrize("first", ["slurmkit", "the driver"])
def test_a_node_death_in_training_is_detected_and_the_run_resumes(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int, first: str
) -> None:
    job = submit(machines, here, "--until-done")
    job.is_up()
    following = job.next()
    began = time.time()
    machine(machines, "kill-node", "node2")
    if first == "the driver":
        (here / "lost").touch()
    end = job.end()
    (here / "lost").unlink(missing_ok=True)
    tell("node dead in training, until the job's end is written", end["ended"] - began)
    try:
        assert (end["code"], end["bad_nodes"], end["goes_on"]) == (75, ["node2"], True)
        beats = {"the driver": 5, "slurmkit": 10}[first]
        assert f"node node2: no sign of life for {beats * BEAT:g} s" in job.output()
        assert end["ended"] - began < 45
        wait_until(lambda: left_of(machines, "node1", f"{job.job_id}.0") == "", "all of it is down", 10)
        job.is_up(following)
        assert job.state() == "COMPLETING", "Slurm waits for the dead node"
        (here / "enough").touch()
        assert job.end(following)["code"] == 0
        start = json.loads((job.attempt(following) / "start.json").read_text())
        assert {key: start[key] for key in ("attempt", "previous", "nodes")} == {
            "attempt": 2,
            "previous": job.job_id,
            "nodes": "node[1,3]",
        }
    finally:
        machine(machines, "start-node", "node2")


def test_if_node_one_dies_the_second_ends_the_job_and_the_run_resumes(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    job = submit(machines, here, "--until-done")
    job.is_up()
    wait_until((job.attempt() / "bringup/watching").exists, "the first node has looked once")
    following = job.next()
    began = time.time()
    machine(machines, "kill-node", "node1")
    try:
        end = job.end()
        tell("first node dead in training, until the job's end is written", end["ended"] - began)
        assert (end["code"], end["bad_nodes"], end["goes_on"], end["cancelled"]) == (75, ["node1"], True, False)
        assert end["reason"] == f"node node1: no sign of life for {10 * BEAT:g} s"
        job.is_up(following)
        (here / "enough").touch()
        assert job.end(following)["code"] == 0
        start = json.loads((job.attempt(following) / "start.json").read_text())
        assert (start["attempt"], start["nodes"]) == (2, "node[2-3]")
    finally:
        machine(machines, "start-node", "node1")


def test_a_node_whose_raylet_dies_is_left_out_of_the_next_attempt(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    job = submit(machines, here, "--until-done", SECRET_OF_MINE="it's\n$HOME")
    job.is_up()
    following = job.next()
    began = time.time()
    kill_raylet(machines, "node2")
    end = job.end()
    tell("raylet dead, until the job's end is written", end["ended"] - began)
    assert (end["code"], end["bad_nodes"], end["goes_on"]) == (75, ["node2"], True)
    assert "node node2: its raylet died" in end["reason"]
    job.is_up(following)
    tell("raylet dead, until the next attempt trains", time.time() - began)
    shown = machines.ask("scontrol", "-o", "show", "job", following)
    assert " ExcNodeList=node2 " in shown
    assert " NodeList=node[1,3] " in shown
    (here / "enough").touch()
    assert job.end(following)["code"] == 0


def kill_on(cluster: Cluster, node: str, name: str, number: int = 9) -> None:
    cluster.on_node(node, "sh", "-c", f"kill -{number} $(ps -eo pid,comm | awk '$2 == \"{name}\" {{print $1}}')")


@pytest.mark.parametrize(
    ("fault", "reason", "bad_node"),
    [
        pytest.param("node dies", "no sign of life", "node2", marks=pytest.mark.nightly),
        ("raylet hangs", "Ray has marked it dead", "node2"),
        pytest.param("no network", "Ray has marked it dead", "node2", marks=pytest.mark.nightly),
        ("GCS dies", "its GCS died", "node1"),
    ],
)
def test_a_command_that_fails_because_of_a_node_is_resumed_without_it(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int, fault: str, reason: str, bad_node: str
) -> None:
    (here / "find.sh").write_text(ELSEWHERE)
    job = submit(machines, here, "--until-done", command=("bash", "find.sh", "steps.py"), ray=True)
    job.is_up()
    following = job.next()
    began = time.time()
    try:
        if fault == "node dies":
            machine(machines, "kill-node", "node2")
        elif fault == "raylet hangs":
            kill_on(machines, "node2", "raylet", 19)
        elif fault == "no network":
            machines.on_node("node2", "ip", "link", "set", "eth0", "down")
        else:
            kill_on(machines, "node1", "gcs_server")
        end = job.end()
        tell(f"{fault}, until the job's end is written", end["ended"] - began)
        assert (end["code"], end["bad_nodes"], end["goes_on"]) == (75, [bad_node], True), end
        assert f"node {bad_node}: {reason}" in end["reason"]
        job.is_up(following)
        (here / "enough").touch()
        assert job.end(following)["code"] == 0
    finally:
        if fault == "node dies":
            machine(machines, "start-node", "node2")
        elif fault == "no network":
            machines.on_node("node2", "ip", "link", "set", "eth0", "up")
            end_completing(machines, "node2")


def test_a_driver_that_fails_ends_the_run_with_its_code_and_its_last_words(
    machines: Cluster, here: Path, run: int
) -> None:
    job = submit(machines, here, "--until-done", command=("bash", "-c", "echo the reason; exit 7"))
    end = job.end()
    assert (end["code"], end["goes_on"], end["bad_nodes"]) == (7, False, [])
    job.is_over()
    assert machines.ended(job.job_id) == "FAILED|7:0"
    assert "the command failed with exit code 7; the end of " in job.output()
    assert "\nthe reason\n" in job.output()
    wait_until(lambda: machines.ask("squeue", "-h").strip() == "", "the follow-up is cancelled")


def test_a_kernel_memory_kill_is_reported_with_the_limit_and_the_peak(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    # The cgroup in which a Slurm with ConstrainRAMSpace puts a step; slurmkit's shell and all that it starts are in it.
    group = f"/sys/fs/cgroup/memory/slurmkit-test-{os.getpid()}"
    limit = 600 << 20
    setup = (
        f"mkdir -p {group}/step && echo {limit} >{group}/memory.limit_in_bytes && "
        f"{{ [[ $SLURM_NODEID == 0 ]] || for id in $$ $sk_keeper_pid; do echo $id >{group}/step/cgroup.procs; done; }}"
    )
    script = EAT.replace("@ray.remote(", '@ray.remote(resources={"node:" + __import__("os").environ["X"]: 0.01}, ')
    (here / "eat.py").write_text(script)
    (here / "find.sh").write_text('read -r _ X _ <"$SK_MEET/ready.1"; export X; exec python eat.py')
    job = submit(
        machines, here, job=f"setup: ['{setup}']\nenv: {{RAY_memory_monitor_refresh_ms: '0'}}\n",
        command=("bash", "find.sh"), ray=True,
    )  # fmt: skip
    end = job.end()
    assert end["bad_nodes"] == []
    assert re.search(r"node node2: a process was killed for memory: limit 600 MiB, peak [56]\d\d MiB", end["reason"])
    assert end["code"] == 75


def test_a_worker_that_ray_kills_for_memory_is_told_with_used_and_limit(
    machines: Cluster, here: Path, run: int
) -> None:
    job = submit(
        machines, here, nodes=1, command=("eat.py",), ray=True,
        job="env: {RAY_memory_usage_threshold: '0.01', RAY_memory_monitor_refresh_ms: '100'}\n",
    )  # fmt: skip
    end = job.end()
    assert re.search(r"Ray killed a worker for memory: .*GB used / .*GB limit", end["reason"])
    assert (end["code"], end["bad_nodes"]) == (75, [])


def test_without_progress_all_stacks_are_written_and_the_job_ends(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    (here / "find.sh").write_text('read -r _ ELSEWHERE _ <"$SK_MEET/ready.1"; export ELSEWHERE; exec python hang.py')
    job = submit(machines, here, job="watchdog: 0.4\n", command=("bash", "find.sh"), ray=True)
    job.is_up()
    began = time.time()
    end = job.end()
    tell("no progress for 24 s, until the end is written", end["ended"] - began)
    assert (end["code"], end["bad_nodes"]) == (75, [])
    assert "no progress for 24 s" in end["reason"]
    stacks = {path.name: path.read_text() for path in job.attempt().glob("stacks-*.txt")}
    assert any(name.startswith("stacks-node2-") and "in sleeps_for_ever" in text for name, text in stacks.items())
    assert any(name.startswith("stacks-node1-") and 'hang.py", line 1' in text for name, text in stacks.items())


def test_before_the_time_limit_the_driver_saves_and_a_follow_up_goes_on(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    job = submit(machines, here, "--until-done")
    assert "#SBATCH --signal=B:USR2@150" in (job.run_dir / "job.sbatch").read_text()
    assert "#SBATCH --no-requeue" in (job.run_dir / "job.sbatch").read_text()
    job.is_up()
    following = job.next()
    began = time.time()
    ends_in(machines, job, 100)
    end = job.end()
    tell("time limit near, until saved and the job's end is written", end["ended"] - began)
    assert (end["code"], end["goes_on"]) == (85, True)
    assert "its time limit or a preemption is near (USR2)" in end["reason"]
    job.is_up(following)
    tell("time limit near, until the next attempt trains", time.time() - began)
    (here / "enough").touch()
    assert job.end(following)["code"] == 0
    saved = re.search(r"interrupted after step (\d+)", job.log())
    assert saved
    assert f"goes on after step {saved[1]}\n" in job.log(following), "no step is lost"
    wait_until(lambda: machines.ask("squeue", "-h").strip() == "", "when it is complete, no follow-up waits")
    assert not (job.attempt(following) / "next").exists()


def test_a_time_limit_that_nobody_announced_still_lets_the_driver_save(machines: Cluster, here: Path, run: int) -> None:
    job = submit(machines, here)
    job.is_up()
    ends_in(machines, job, 2)
    end = job.end()
    assert (end["code"], end["goes_on"], end["cancelled"]) == (85, False, False)
    assert "it has reached its time limit" in end["reason"]
    assert "interrupted after step" in job.log()


@pytest.mark.parametrize("partition", ["batch", "graceful"])
def test_a_preempted_run_saves_and_goes_on_when_the_other_job_is_over(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int, partition: str
) -> None:
    job = submit(machines, here, "--until-done", "--partition", partition)
    job.is_up()
    following = job.next()
    began = time.time()
    machines.ask("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")
    end = job.end()
    tell("preempted, until saved and the job's end is written", end["ended"] - began)
    assert (end["code"], end["goes_on"], end["cancelled"]) == (85, True, False)
    assert "it is preempted" in end["reason"]
    job.is_up(following)
    (here / "enough").touch()
    assert job.end(following)["code"] == 0
    saved = re.search(r"interrupted after step (\d+)", job.log())
    assert saved
    assert f"goes on after step {saved[1]}\n" in job.log(following), "no step is lost"


def test_scancel_ends_everything_and_the_follow_up_too(
    machines: Cluster, here: Path, tell: Callable[[str, float], None], run: int
) -> None:
    job = submit(machines, here, "--until-done")
    job.is_up()
    following = job.next()
    began = time.time()
    machines.ask("scancel", job.job_id)
    wait_until(lambda: left_on(machines, "node1") + left_on(machines, "node2") == [], "all is down")
    tell("scancel, until everything is down", time.time() - began)
    end = job.end()
    assert (end["code"], end["goes_on"], end["cancelled"]) == (143, False, True)
    assert "it was cancelled" in job.output()
    wait_until(lambda: job.state(following) == "CANCELLED", "the follow-up is cancelled")
    assert machines.ended(job.job_id).startswith("CANCELLED")


def test_a_controller_that_restarts_is_not_noticed_by_a_running_job(machines: Cluster, here: Path, run: int) -> None:
    job = submit(machines, here, "--until-done")
    job.is_up()
    # One that is killed before it has saved that the job runs starts it once more, as the test below has it.
    state, began = Path(machines.configuration).parents[1] / "local/slurmctld/job_state", time.time()
    saved = ("stat", "-c", "%Y", str(state))
    machines.ask("scontrol", "update", f"JobId={job.next()}", "Comment=a change, which it saves")
    wait_until(lambda: int(machines.on_node("controller", *saved)) > began, "slurmctld has saved its state")
    machines.on_node("controller", "sh", "-c", "kill -9 $(pidof slurmctld)")
    time.sleep(3)
    machines.on_node("controller", "slurmctld")
    wait_until(lambda: "UP" in machines.ask("sh", "-c", "scontrol ping || true"), "slurmctld is back")
    (here / "enough").touch()
    assert job.end()["code"] == 0
    wait_until(lambda: machines.ask("squeue", "-h").strip() == "", "the follow-up is cancelled")
    assert machines.ended(job.job_id) == "COMPLETED|0:0"


def test_a_follow_up_is_queued_once_though_sbatch_s_answer_is_lost(machines: Cluster, here: Path, run: int) -> None:
    (here / "bin").mkdir()
    (here / "bin/sbatch").write_text(
        "#!/bin/bash\n"
        '[[ " $* " != *" --dependency="* ]] || { /usr/bin/sbatch "$@" >/dev/null; echo "timed out" >&2; exit 1; }\n'
        'exec /usr/bin/sbatch "$@"\n'
    )
    (here / "bin/sbatch").chmod(0o755)
    job = submit(machines, here, "--until-done", PATH=f"{here}/bin:{os.environ['PATH']}")
    job.is_up()
    following = job.next()
    assert machines.ask("squeue", "-h", "-t", "PD", "-o", "%i").split() == [following]
    (here / "enough").touch()
    job.end()


def test_a_job_restarted_by_slurm_under_the_same_id_ignores_stale_files(
    machines: Cluster, here: Path, run: int
) -> None:
    """As a slurmctld does that was killed before it had saved that the job runs."""
    job = submit(machines, here, "--until-done", nodes=3, job="sbatch: {hold: true}\n")
    meeting = job.attempt() / "bringup"
    meeting.mkdir(parents=True)
    for name, text in {"exit_code": "1", "head": "203.0.113.1:1", "failed.node1": "no fault", "code": "1"}.items():
        (meeting / name).write_text(text)
    nodes = ("node1", "node2", "node3")
    for node in nodes:
        machines.on_node(node, "mkdir", "-p", f"/tmp/sk-{job.job_id}.0/tmp")
    script = str(job.run_dir / "job.sbatch")
    following = machines.ask("sbatch", "--parsable", f"--dependency=afterany:{job.job_id}", script).strip()
    machines.ask("scontrol", "release", job.job_id)
    job.is_up()
    assert job.next() == following
    assert machines.ask("squeue", "-h", "-t", "PD", "-o", "%i").split() == [following]
    (here / "enough").touch()
    assert job.end()["code"] == 0
    wait_until(lambda: not any(left_on(machines, node) for node in nodes), "nothing is left")


def test_a_follow_up_of_a_run_that_is_done_ends_at_once(machines: Cluster, here: Path, run: int) -> None:
    (here / "bin").mkdir()
    (here / "bin/scancel").write_text("#!/bin/sh\nexit 1\n")  # as when slurmctld is away
    (here / "bin/scancel").chmod(0o755)
    (here / "enough").touch()
    job = submit(machines, here, "--until-done", PATH=f"{here}/bin:{os.environ['PATH']}")
    assert job.end()["code"] == 0
    following = job.next()
    job.is_over(following)
    assert machines.ended(following) == "COMPLETED|0:0"
    assert f"job {job.job_id} ended the run" in job.output(following)
    assert not job.attempt(following).exists()


def test_until_done_stops_after_three_attempts_without_a_newer_checkpoint(
    machines: Cluster, here: Path, run: int
) -> None:
    run_dir = here / "results/x"
    # The first attempt makes a checkpoint and dies; the three after it die without one.
    command = "[[ -e enough ]] || { mkdir -p results/x/step_1; touch results/x/step_1/manifest.json enough; }; exit 75"
    spec = JobSpec(
        name="x", time="10", python=machines.stub_python, workdir=str(here), run_dir=str(run_dir), config="seed: 1\n",
        command=("bash", "-c", command), until_done=UntilDone(enabled=True),
        ray=RayOptions(num_cpus=1, object_store_memory=100_000_000),
    )  # fmt: skip
    run_dir.mkdir(parents=True)
    (run_dir / "job.sbatch").write_text(render(spec))
    (run_dir / name_of_keeper()).write_text(keeper_text())
    first = machines.ask("sbatch", "--parsable", str(run_dir / "job.sbatch")).strip()
    job = Job(machines, here, first)
    ends: list[dict[str, Any]] = []
    while not ends or ends[-1]["goes_on"]:
        ends.append(job.end(first))
        first = (job.attempt(first) / "next").read_text().strip() if ends[-1]["goes_on"] else ""
    assert len(ends) == 4
    assert "3 attempts in a row failed without a newer checkpoint than step_1" in ends[-1]["reason"]


def test_a_setup_that_fails_everywhere_ends_the_run_after_two_attempts(machines: Cluster, here: Path, run: int) -> None:
    job = submit(machines, here, "--until-done", job="setup: [no-such-module load cuda]\n")
    first = job.end()
    assert (first["bad_nodes"], first["goes_on"]) == ([], True)
    assert "all 2 nodes failed: a line of setup" in first["reason"]
    assert "no-such-module: command not found" in first["reason"]
    end = job.end(job.next())
    assert (end["code"], end["bad_nodes"], end["goes_on"]) == (75, [], False)
    assert end["reason"].endswith("2 attempts in a row ended before the command started")


def test_an_attempt_killed_hard_is_recorded_from_accounting(machines: Cluster, here: Path, run: int) -> None:
    job = submit(machines, here, "--until-done")
    job.is_up()
    following = job.next()
    machines.ask("scancel", "--batch", "--signal=KILL", job.job_id)
    job.is_up(following)
    end = job.end()
    assert (end["code"], end["goes_on"]) == (137, True)
    assert "the batch script was killed, before it recorded its end (Slurm: FAILED)" in end["reason"]
    (here / "enough").touch()
    assert job.end(following)["code"] == 0


@pytest.mark.parametrize("fills", ["for good", "for a while"])
def test_a_full_file_system_is_named_and_leaves_nothing_on_the_nodes(
    machines: Cluster, here: Path, small: Path, run: int, fills: str
) -> None:
    (here / "results").symlink_to(small)
    for path in small.iterdir():
        shutil.rmtree(path)
    full = "head -c 200M /dev/zero >results/full || true"
    ends = {"for good": "exit 3", "for a while": "sleep 12; rm results/full; touch up; sleep 30"}[fills]
    job = submit(machines, here, "--until-done", command=("bash", "-c", f"{full}; {ends}"))
    if fills == "for a while":
        job.is_up()
        time.sleep(6)
        assert not list(job.attempt().glob("bringup/lost.*"))
        assert not (job.attempt() / "end.json").exists()
        machines.ask("scancel", job.job_id)
    end = job.end()
    wait_until(lambda: left_on(machines, "node1") + left_on(machines, "node2") == [], "nothing is left")
    if fills == "for good":
        assert (end["code"], end["goes_on"]) == (3, False)
        shown = machines.slurmkit(here, "status", "x").stdout
        assert "no space left on /" in shown
        assert "(No space left on device)" in shown
        (small / "full").unlink()


def test_submit_wait_until_done_waits_for_the_run(machines: Cluster, here: Path, run: int) -> None:
    (here / "job.yaml").write_text("name: x\nnodes: 1\ntime: 10\nray: {num_cpus: 1, object_store_memory: 100000000}\n")
    command = "[[ -e again ]] || { touch again; exit 85; }; exit 7"
    done = machines.slurmkit(here, "submit", "job.yaml", "--until-done", "--wait", "--", "bash", "-c", command)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "x: failed: the command failed with exit code 7" in done.stdout


def test_max_attempts_limits_the_chain_and_the_last_keeps_the_environment(
    machines: Cluster, here: Path, run: int
) -> None:
    # What Slurm and slurmkit set for one attempt is not handed to the next: only what was submitted is.
    command = 'printf "%s|" "$MINE" "${SBATCH_X-}" "${SK_CHAIN-}"; echo "$SLURM_JOB_ID $PATH"; exit 85'
    job = submit(
        machines, here, "--until-done", "--max-attempts", "2", nodes=1, command=("bash", "-c", command),
        MINE="it's\n$HOME",
    )  # fmt: skip
    following = job.next()
    end = job.end(following)
    assert (end["code"], end["goes_on"]) == (85, False)
    assert "attempt 2 of 2 was the last (max_attempts)" in end["reason"]
    assert job.log().startswith("it's\n$HOME|||")
    assert job.log().replace(job.job_id, following) == job.log(following)
