"""A submission while the controller is away: waited for, given up with one error, and never made twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, development_cluster
from tests.support.requirements import SLURMKIT

pytestmark = pytest.mark.slurm

SBATCH = """#!/bin/bash
# An sbatch that does what it is told {times} times and then says that it does not know.
[[ $1 == --parsable ]] || exec {real} "$@"
echo >>"{here}/tries"
{real} "$@" >"{here}/answer.$(wc -l <"{here}/tries")" || exit
if (($(wc -l <"{here}/tries") <= {times})); then {end}; fi
cat "{here}/answer.$(wc -l <"{here}/tries")"
"""
LOST = 'echo "sbatch: error: Unable to contact slurm controller (send failure)" >&2; exit 1'


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With a controller that these tests may stop, and that is not waited for as long as by default."""
    lines = tmp_path_factory.mktemp("conf") / "lines"
    lines.write_text("MessageTimeout=3\n")
    with development_cluster(f"once{os.getpid()}", "--nodes", "1", "--conf", lines) as cluster:
        yield cluster


def lossy(cluster: Cluster, folder: Path, end: str, times: int = 1) -> dict[str, str]:
    """PATH with an sbatch in front whose answer is lost after the job was registered."""
    binaries = folder / "bin"
    binaries.mkdir()
    real = "/usr/bin/sbatch"
    (binaries / "sbatch").write_text(SBATCH.format(real=real, here=folder, times=times, end=end))
    (binaries / "sbatch").chmod(0o755)
    return {"PATH": f"{binaries}:{os.environ['PATH']}"}


def controller(cluster: Cluster) -> str:
    return cluster.on_node("controller", "pgrep", "-x", "slurmctld").strip()


def jobs_named(cluster: Cluster, name: str) -> list[str]:
    return cluster.ask("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%A %T").splitlines()


def recorded(folder: Path, name: str) -> list[str]:
    record = json.loads((folder / f"results/{name}/run.json").read_text())
    return [attempt["job_id"] for attempt in record["attempts"]]


@pytest.mark.parametrize("end", [LOST, "kill -9 $$", "echo nonsense; exit"], ids=["error", "killed", "nonsense"])
def test_job_with_a_lost_submit_reply_is_found_and_not_resubmitted(own: Cluster, shared_path: Path, end: str) -> None:
    hold = ["submit", "--name", "lost", "--set", "sbatch.hold=true"]
    first = own.slurmkit(shared_path, *hold, "--name", "other", "--", "true")
    assert first.returncode == 0, first.stderr
    done = own.slurmkit(shared_path, *hold, "--", "true", **lossy(own, shared_path, end))
    assert done.returncode == 0, done.stderr
    [job] = recorded(shared_path, "lost")
    assert f"job            {job}\n" in done.stdout
    assert (shared_path / "tries").read_text() == "\n"
    found = [line for line in jobs_named(own, "lost") if "PENDING" in line]
    assert found == [f"{job} PENDING"]
    own.ask("scancel", job, *recorded(shared_path, "other"))


def test_earlier_job_is_not_mistaken_for_one_with_a_lost_submit_reply(own: Cluster, shared_path: Path) -> None:
    job = ["submit", "--name", "again", "--set", "ray.num_cpus=1"]
    assert own.slurmkit(shared_path, *job, "--wait", "--", "true").returncode == 0
    held = own.slurmkit(shared_path, *job, "--set", "sbatch.hold=true", "--", "true", **lossy(own, shared_path, LOST))
    assert held.returncode == 0, held.stderr
    first, second = recorded(shared_path, "again")
    assert jobs_named(own, "again") == [f"{first} COMPLETED", f"{second} PENDING"]
    refused = own.slurmkit(shared_path, *job, "--", "true")
    assert refused.returncode == 2
    assert f"belongs to job {second}, which is PENDING" in refused.stderr
    own.ask("scancel", second)


def test_a_refusal_is_not_tried_again(own: Cluster, shared_path: Path) -> None:
    refuse = 'echo "sbatch: error: Batch job submission failed: Invalid qos specification" >&2; exit 1'
    environment = lossy(own, shared_path, refuse)
    wrapper = shared_path / "bin/sbatch"
    wrapper.write_text(wrapper.read_text().replace('/usr/bin/sbatch "$@" >', 'true "$@" >'))
    done = own.slurmkit(shared_path, "submit", "--", "true", **environment)
    assert done.returncode == 1
    assert "Invalid qos specification" in done.stderr
    assert "trying again" not in done.stderr
    assert (shared_path / "tries").read_text() == "\n"
    assert not (shared_path / "results").exists()


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_controller_that_comes_back_gets_the_job_once(own: Cluster, shared_path: Path, how: str) -> None:
    """It goes away between --test-only, which is answered, and the submission itself."""
    # A stopped controller takes in what reached it meanwhile when it goes on, so a try may arrive late.
    away = "-STOP" if how == "stopped" else "-KILL"
    environment = lossy(own, shared_path, "true")
    wrapper = shared_path / "bin/sbatch"
    go = f'"{shared_path}/go"'
    wait = f"[[ -e {go} ]] || {{ touch {go}.wanted; until [[ -e {go} ]]; do sleep 0.1; done; }}\n"
    wrapper.write_text(wrapper.read_text().replace("echo >>", wait + "echo >>", 1))
    process = subprocess.Popen(
        [SLURMKIT, "submit", "--name", how, "--set", "sbatch.hold=true", "--", "true"],
        cwd=shared_path,
        env={**own.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (shared_path / "go.wanted").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = controller(own)
    own.on_node("controller", "kill", away, pid)
    (shared_path / "go").touch()
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert "controller is away" in said, said + process.stderr.read()
        assert "--retry-for SECONDS" in said
    finally:
        if how == "stopped":
            own.on_node("controller", "kill", "-CONT", pid)
        else:
            own.on_node(
                "controller", "sh", "-c", f"SLURM_CONF={own.configuration} setsid slurmctld -D >/dev/null 2>&1 &"
            )
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    [job] = recorded(shared_path, how)
    assert f"job            {job}\n" in output
    time.sleep(3)
    assert [line for line in jobs_named(own, how) if "PENDING" in line] == [f"{job} PENDING"]
    own.ask("scancel", job)


def test_a_controller_that_stays_away_is_one_error_and_leaves_nothing(own: Cluster, shared_path: Path) -> None:
    (shared_path / "train.yaml").write_text("env: {name: arithmetic}\npolicy: {from_scratch: {}}\n")
    pid = controller(own)
    own.on_node("controller", "kill", "-STOP", pid)
    try:
        done = own.slurmkit(
            shared_path, "submit", "--retry-for", "3", "--config", "train.yaml", "cluster.gpus_per_node=0"
        )
    finally:
        own.on_node("controller", "kill", "-CONT", pid)
    assert done.returncode == 1
    assert [line[:40] for line in done.stderr.splitlines()] == [
        "Slurm's controller is away (sbatch faile",
        "error: Slurm's controller gave no answer",
    ]
    assert [path.name for path in shared_path.iterdir()] == ["train.yaml"]


def test_an_interrupted_submission_takes_its_job_out_of_the_queue(own: Cluster, shared_path: Path) -> None:
    environment = lossy(own, shared_path, f'touch "{shared_path}/registered"; sleep 60')
    process = subprocess.Popen(
        [SLURMKIT, "submit", "--name", "interrupted", "--set", "sbatch.hold=true", "--", "true"],
        cwd=shared_path,
        env={**own.environment, **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (shared_path / "registered").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert ["CANCELLED" in line for line in jobs_named(own, "interrupted")] == [True]
    assert not (shared_path / "results").exists()
