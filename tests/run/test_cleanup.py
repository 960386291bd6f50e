"""`slurmkit cleanup`: what a dead run left is found and ended, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from slurmkit.run import leftovers
from tests.run.test_local import run, wait_for
from tests.support.cluster import Cluster
from tests.support.requirements import SLURMKIT

# The trainer's own Ray, without a model, and a large file in shared memory as engines have.
RAY = """
import mmap, pathlib, sys, time
from slurmkit.grpo.cluster import ray_connection
import ray
with ray_connection():
    @ray.remote
    class Engine:
        def __init__(self, path):
            with open(path, "w+b") as file:
                file.truncate(1 << 20)
                self.memory = mmap.mmap(file.fileno(), 1 << 20)
        def ready(self): return True
    engine = Engine.remote(sys.argv[1])
    ray.get(engine.ready.remote())
    pathlib.Path("up").touch()
    time.sleep(600)
"""


def cleanup(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SLURMKIT, "cleanup", *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def marked_by(supervisor: int) -> list[psutil.Process]:
    """Processes that carry the mark of a run that this process supervised."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SK_MARK", "").startswith(f"local-{supervisor}."):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_with_guard(run: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a run and the guard that would end what the run left."""
    guards = [each for each in psutil.Process(run.pid).children() if leftovers.__file__ in each.cmdline()]
    assert len(guards) == 1
    guards[0].kill()
    run.kill()


def folders_of(processes: list[psutil.Process]) -> set[str]:
    words = [word for process in processes for word in process.cmdline()]
    return {"/".join(word[word.index("/tmp/slurmkit-") :].split("/")[:3]) for word in words if "/tmp/slurmkit-" in word}


@contextmanager
def a_run(folder: Path, name: str, shared: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir()
    (folder / "ray_driver.py").write_text(RAY)
    command = [SLURMKIT, "run", "--name", name, "--", sys.executable, "ray_driver.py", shared]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)
        for left in marked_by(process.pid):
            left.kill()
        Path(shared).unlink(missing_ok=True)


@contextmanager
def ray_by_hand(folder: Path) -> Iterator[list[psutil.Process]]:
    command = ["ray", "start", "--head", "--port=0", "--num-cpus=1", "--include-dashboard=false"]
    command[0] = str(Path(sys.executable).with_name("ray"))
    subprocess.run([*command, f"--temp-dir={folder}"], check=True, capture_output=True, timeout=120)
    processes = [
        each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or [])
    ]
    try:
        assert any("raylet" in each.name() for each in processes)
        yield processes
    finally:
        for each in processes:
            each.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_cleanup_ends_a_killed_run_but_spares_live_runs_and_manual_ray(tmp_path: Path) -> None:
    shared = [f"/dev/shm/slurmkit-test-{os.getpid()}-{name}" for name in ("dead", "live")]
    with ExitStack() as stack:
        dead = stack.enter_context(a_run(tmp_path / "dead", "x", shared[0]))
        live = stack.enter_context(a_run(tmp_path / "live", "y", shared[1]))
        by_hand = stack.enter_context(ray_by_hand(Path(f"/tmp/hand{os.getpid()}")))
        for name in ("dead", "live"):
            wait_for(tmp_path / name / "up", 120)
        before, living = marked_by(dead.pid), marked_by(live.pid)
        left, kept = folders_of(before), folders_of(living)
        important = {each.pid for each in before if each.name() in ("raylet", "gcs_server", "ray::Engine")}
        assert len(important) == 3
        assert len(left) == len(kept) == 1
        assert all(map(os.path.exists, [*left, *kept, *shared]))
        for folder in kept:
            os.utime(folder, (0, 0))  # what is fresh is left alone anyway
        run_dir = str(tmp_path / "dead/results/x")

        def told() -> list[int]:
            found = json.loads(cleanup("--json").stdout)
            assert not {each.pid for each in [*living, *by_hand]} & {each["pid"] for each in found["processes"]}
            return [each["pid"] for each in found["processes"] if each["run"] == run_dir]

        assert told() == [], "it lives"
        kill_with_guard(dead)
        assert important <= set(told())

        other = run(tmp_path, "--name", "z", "--", "true")
        assert other.returncode == 0
        assert "note: dead runs of yours left" in other.stdout

        asked = cleanup()
        assert asked.returncode == 1
        assert any("raylet" in line and line.endswith(run_dir) for line in asked.stdout.splitlines())
        assert psutil.pid_exists(before[0].pid), "nobody said yes"
        done = cleanup("--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        assert not marked_by(dead.pid)
        assert not any(map(os.path.exists, [*left, shared[0]]))
        assert all(each.is_running() for each in [*living, *by_hand])
        assert all(map(os.path.exists, [*kept, shared[1]]))


def test_cleanup_keeps_processes_of_jobs_known_to_slurm_or_their_shell(cluster: Cluster, shared_path: Path) -> None:
    """On a node, which has process ids and a /tmp of its own."""
    held = "submit --name held --set sbatch.hold=true -- true"
    slurmkit = shlex.quote(str(SLURMKIT))
    pending = cluster.slurmkit(shared_path, *held.split()).stdout.split()[1]
    # Read from a pipe: a process whose command line names a folder is at work in it.
    script = f"""
    export SLURM_CONF={cluster.configuration}
    mkdir -p /tmp/sk-{pending}.0 /tmp/sk-777777.0 /tmp/sk-888888.0 /tmp/sk-mine
    SK_MARK={pending}.0 setsid sleep 601 &
    SK_MARK=777777.0 SK_ATTEMPT_DIR=/w/results/gone/attempts/777777.0 setsid sleep 602 &
    SK_ATTEMPT=888888.0 setsid sleep 603 &
    SK_MARK=888888.0 setsid sleep 604 &
    sleep 0.5
    {slurmkit} cleanup --yes
    echo "exit $?"
    ps -eo args | grep '^sleep 60[0-9]'; ls -d /tmp/sk-*
    PATH=/nowhere {slurmkit} cleanup --yes 2>&1
    pkill -x -f 'sleep 60[0-9]'; rm -rf /tmp/sk-*
    """
    said = cluster.on_node("node4", "bash", "-s", input=script)
    cluster.ask("scancel", pending)
    assert "exit 0" in said, said
    assert "/w/results/gone\n/tmp/sk-777777.0\n" in said
    after = said.partition("exit 0\n")[2]
    assert [line for line in after.splitlines() if line.startswith("sleep")] == ["sleep 601", "sleep 603", "sleep 604"]
    assert {f"/tmp/sk-{pending}.0", "/tmp/sk-888888.0", "/tmp/sk-mine"} <= set(after.splitlines())
    assert "/tmp/sk-777777.0" not in after
    assert f"left alone, as Slurm cannot be asked whether their jobs still run: {pending}.0\n" in after


@pytest.mark.parametrize(("again", "code", "cancelled"), [(False, 85, False), (True, 143, True)])
def test_an_interrupt_asks_the_command_alone_and_a_second_one_ends_it(
    here: Path, again: bool, code: int, cancelled: bool
) -> None:
    """A driver that saves with the help of its children, which must not hear of it."""
    script = """
    trap 'for i in {1..20}; do kill -0 $child || exit 9; sleep 0.1; done; exit 85' TERM
    sleep 300 & child=$!; touch up; while :; do wait $child; done
    """
    if again:
        script = script.replace("for i in {1..20}", "trap - TERM; for i in {1..200}")
    process = subprocess.Popen(
        [SLURMKIT, "run", "--", "bash", "-c", script],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(here / "up")
    process.send_signal(signal.SIGTERM)
    if again:
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, output + errors
    assert "interrupted: the command is asked to leave" in output
    assert ("interrupted again" in output) == again
    attempt = here / "results/bash/attempts/local-1"
    start, end = (json.loads((attempt / name).read_text()) for name in ("start.json", "end.json"))
    assert (start["local"], start["attempt"], start["pid"], start["previous"]) == ("local-1", 1, process.pid, None)
    assert (end["code"], end["cancelled"], end["goes_on"], end["bad_nodes"]) == (code, cancelled, False, [])
    assert start["started"] <= end["ended"] <= time.time()
    if not again:
        assert "interrupted in order (85): the same command goes on" in errors


@pytest.mark.parametrize(
    ("environment", "cgroup", "is_other"),
    [
        ({"SK_MARK": "5.0", "SLURM_JOB_ID": "5"}, "0::/x/job_5/step_0\n", False),
        ({"SK_MARK": "5.0"}, "0::/\n", False),
        ({"SK_MARK": "5.0", "SLURM_JOB_ID": "6"}, "0::/\n", True),
        ({"SK_MARK": "5.0"}, "9:memory:/slurm/uid_0/job_6/step_batch\n0::/\n", True),
        ({"SK_MARK": "local-9.1", "SK_OUTER_JOB": ""}, "0::/user.slice\n", False),
        ({"SK_MARK": "local-9.1", "SK_OUTER_JOB": "", "SLURM_JOB_ID": "6"}, "0::/\n", True),
        ({"SK_MARK": "local-9.1", "SK_OUTER_JOB": "7", "SLURM_JOB_ID": "7"}, "0::/x/job_7\n", False),
        ({"SLURM_JOB_ID": "6"}, "0::/\n", False),
    ],
)
def test_a_job_from_inside_a_run_is_not_the_run_s(environment: dict[str, str], cgroup: str, is_other: bool) -> None:
    assert leftovers._is_of_another_job(environment, cgroup) is is_other


def test_what_ends_a_run_leaves_a_job_from_inside_it_alone() -> None:
    mark = {"SK_MARK": "local-1.1", "SK_OUTER_JOB": "", "SK_ATTEMPT": "888888.0"}
    run_s, job_s = (
        subprocess.Popen(["sleep", "60"], env={**mark, **job}, start_new_session=True)
        for job in ({}, {"SLURM_JOB_ID": "6"})
    )
    try:
        assert leftovers.end({"local-1.1"}) == 0
        assert run_s.wait(5) == -signal.SIGTERM
        assert job_s.poll() is None
    finally:
        job_s.kill()
        job_s.wait()
