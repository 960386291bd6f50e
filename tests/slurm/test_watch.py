"""The eyes on real jobs: from the queue to the end, cancelled in the queue and while they run, and their usage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster, wait_until
from tests.support.requirements import SLURMKIT

OPTIONS = ["--set", "ray.num_cpus=1", "--set", "ray.object_store_memory=100000000", "--time", "10"]


def submit(cluster: Cluster, here: Path, name: str, *words: str, ray: bool = False) -> str:
    done = cluster.slurmkit(here, "submit", "--name", name, *OPTIONS, *words, ray=ray)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def states(cluster: Cluster, here: Path) -> dict[str, dict[str, Any]]:
    done = cluster.slurmkit(here, "ls", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return {state["name"]: state for state in json.loads(done.stdout)}


def test_a_job_is_seen_in_the_queue_while_it_runs_and_at_its_end(cluster: Cluster, shared_path: Path) -> None:
    here = shared_path
    site = here / "site.yaml"
    site.write_text("price: {per_node_hour: 3600, currency: EUR}\n")
    script = f"until [ -e '{here}/go' ]; do sleep 0.2; done; exit 7"
    held = ["--set", "sbatch.hold=true", "--gres", "gpu:h100:2", "--", "bash", "-c", script]
    job_id = submit(
        cluster, here, "one", "--nodes", "2", *held, ray=True
    )  # whose start takes some seconds, in which it is seen
    state = states(cluster, here)["one"]
    assert (state["state"], state["job_id"]) == ("queued", job_id)
    assert state["reason"] == "held by its user: scontrol release lets it go on"
    waiting = subprocess.Popen(
        [SLURMKIT, "wait", "one"], cwd=here, env=cluster.environment, stdout=subprocess.PIPE, text=True
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "one: queued: held by its user: scontrol release lets it go on\n"
    cluster.ask("scontrol", "release", job_id)
    seen = []

    def runs() -> bool:
        state = states(cluster, here)["one"]
        seen.append((state["state"], state["reason"]))
        return state["state"] == "running"

    wait_until(runs, f"job {job_id} runs: {seen}", 120)
    assert ("starting", "0 of 2 nodes ready") in seen or ("starting", "1 of 2 nodes ready") in seen
    state = states(cluster, here)["one"]
    assert state["nodes"].startswith("node[")
    assert (state["limit"], len(state["attempts"])) == (600, 1)
    assert 0 < state["elapsed"] < 300
    (here / "go").touch()
    assert waiting.wait(120) == 7
    assert waiting.stdout.read().splitlines()[-1].startswith("one: failed: ")
    assert cluster.ended(job_id) == "FAILED|7:0"
    done = cluster.slurmkit(here, "usage", job_id, "--json", SLURMKIT_SITE=str(site))
    usage = json.loads(done.stdout)
    (attempt,) = usage["attempts"]
    assert (attempt["source"], attempt["nodes"], attempt["gpus"]) == ("sacct", 2, 4)
    assert usage["gpu_hours"] == attempt["elapsed"] * 4 / 3600 > 0
    assert (usage["cost"], usage["currency"]) == (attempt["elapsed"] * 2, "EUR")
    assert 0 <= attempt["waited"] < 120
    # Slurm may forget it now: cut off from it, the files say the same.
    (here / "nothing.conf").touch()  # Slurm's commands wait a minute for one that is not there
    away = cluster.slurmkit(here, "status", "one", SLURM_CONF=str(here / "nothing.conf"))
    assert "state          failed: " in away.stdout


def test_cancelling_ends_exactly_that_run_in_the_queue_or_not(cluster: Cluster, shared_path: Path) -> None:
    here = shared_path
    running = submit(cluster, here, "running", "--", "sleep", "300")
    waiting = submit(cluster, here, "waiting", "--set", "sbatch.hold=true", "--", "true")
    stays = submit(cluster, here, "stays", "--set", "sbatch.hold=true", "--", "true")
    # As a running job queues what goes on after it.
    behind = cluster.ask(
        "sbatch", "--parsable", f"--dependency=afterany:{running}", f"{here}/results/running/job.sbatch"
    ).strip()
    wait_until(lambda: (here / f"results/running/attempts/{running}.0").exists(), "the attempt begins", 120)
    (here / f"results/running/attempts/{running}.0/next").write_text(f"{behind}\n")
    wait_until(lambda: states(cluster, here)["running"]["state"] == "running", "it runs", 120)
    assert states(cluster, here)["running"]["next"] == behind
    # A folder copied by hand names another run's job.
    (here / "results/copy").mkdir()
    for name in ("run.json", "job.sbatch"):
        (here / "results/copy" / name).write_text((here / "results/stays" / name).read_text())
    done = cluster.slurmkit(here, "cancel", "copy")
    assert (done.returncode, f"job {stays} is not copy's" in done.stderr) == (2, True), done.stderr

    done = cluster.slurmkit(here, "cancel", "running", "waiting")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"running: cancelled (job {behind} and job {running})",
        f"waiting: cancelled (job {waiting})",
    ]
    found = states(cluster, here)
    assert {name: state["state"] for name, state in found.items() if name != "copy"} == {
        "running": "cancelled",
        "waiting": "cancelled",
        "stays": "queued",
    }
    end = json.loads((here / f"results/waiting/attempts/{waiting}.0/end.json").read_text())
    assert (end["code"], end["cancelled"], end["goes_on"]) == (143, True, False)
    for job_id in (running, waiting, behind):
        assert cluster.ended(job_id).startswith("CANCELLED")
    assert cluster.slurmkit(here, "wait", "waiting").returncode == 143
    again = cluster.slurmkit(here, "cancel", "waiting", "running")
    assert (again.returncode, again.stdout.count("has ended before: cancelled")) == (0, 2)
    cluster.ask("scancel", stays)
