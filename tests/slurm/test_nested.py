"""A job that is submitted from inside a run on the same node outlives the run."""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.support.cluster import Cluster, wait_until
from tests.support.requirements import SLURMKIT

# A job script of a user's own. `unset` is a known way to start MPI or Ray without Slurm.
PLAIN = """#!/bin/bash
#SBATCH --nodelist=node1 --output=slurm-%x.out --time=5
touch "up-$SLURM_JOB_NAME"
[[ $SLURM_JOB_NAME != bare ]] || unset "${!SLURM_@}"
until [[ -e over ]]; do sleep 0.2; done
touch "done-${1:-x}"
"""
SUBMIT_ALL = """
sbatch --parsable -J plain plain.sh plain >plain
sbatch --parsable -J bare plain.sh bare >bare
{slurmkit} submit --name inner --nodes 1 --time 5 --set nodelist=node1 --set ray.object_store_memory=80000000 \\
  -- bash -c 'env -0 >inner.env; touch up-inner; until [[ -e over ]]; do sleep 0.2; done; touch done-inner'
until [[ -e up-plain && -e up-bare && -e up-inner && -e up-typed ]]; do sleep 0.2; done
"""
RAY = ("--set", "ray.object_store_memory=80000000", "--set", "ray.num_cpus=1")


def job_of(text: str) -> str:
    return text.split()[1]


def test_jobs_from_inside_a_job_outlive_it_on_the_same_node(cluster: Cluster, shared_path: Path) -> None:
    (shared_path / "plain.sh").write_text(PLAIN)
    script = SUBMIT_ALL.format(slurmkit=shlex.quote(str(SLURMKIT)))
    options = ("--name", "outer", "--nodes", "1", "--time", "5", "--set", "nodelist=node1", *RAY)
    submitted = cluster.slurmkit(shared_path, "submit", *options, "--", "bash", "-c", script)
    assert submitted.returncode == 0, submitted.stderr
    outer = job_of(submitted.stdout)
    wait_until((shared_path / "up-inner").exists, "the inner run starts", 120)
    typed = cluster.slurmkit(
        shared_path,
        "attach",
        "outer",
        "--",
        "bash",
        "-c",
        f"cd {shlex.quote(str(shared_path))}; env; sbatch -J typed plain.sh typed",
    )
    assert typed.returncode == 0, typed.stderr
    assert "\nSK_" not in typed.stdout
    assert "RAY_ADDRESS=" in typed.stdout
    ended = cluster.ended(outer)
    assert ended == "COMPLETED|0:0"
    jobs = {name: (shared_path / name).read_text().strip() for name in ("plain", "bare")}
    jobs |= {"typed": typed.stdout.split()[-1]}
    running = cluster.ask("squeue", "--noheader", "--format=%j %T", "--name=plain,bare,typed,inner")
    (shared_path / "over").touch()
    assert sorted(running.splitlines()) == [f"{name} RUNNING" for name in ("bare", "inner", "plain", "typed")]
    for job in jobs.values():
        assert cluster.ended(job) == "COMPLETED|0:0"
    wait_until(lambda: all((shared_path / f"done-{name}").exists() for name in (*jobs, "inner")), "all end", 120)
    inner = dict(entry.partition("=")[::2] for entry in (shared_path / "inner.env").read_text().split("\0"))
    assert inner["SK_ATTEMPT"].partition(".")[0] != outer
    ours = {name: value for name, value in inner.items() if name.startswith(("SK_", "RAY_", "TMPDIR"))}
    assert not {name: value for name, value in ours.items() if "outer" in value or f"/sk-{outer}." in value}


def test_a_job_from_inside_a_local_run_outlives_the_run(cluster: Cluster, shared_path: Path) -> None:
    (shared_path / "plain.sh").write_text(PLAIN)
    command = "sbatch --parsable -J plain plain.sh plain >plain; until [[ -e up-plain ]]; do sleep 0.2; done"
    script = f"""
    export SLURM_CONF={cluster.configuration}; cd {shlex.quote(str(shared_path))}
    {shlex.quote(str(SLURMKIT))} run -- bash -c {shlex.quote(command)}; echo "exit $?"
    """
    said = cluster.on_node("node1", "bash", "-s", input=script)
    assert "exit 0" in said
    job = (shared_path / "plain").read_text().strip()
    assert cluster.ask("squeue", "--noheader", "--format=%T", "--jobs", job).strip() == "RUNNING"
    (shared_path / "over").touch()
    assert cluster.ended(job) == "COMPLETED|0:0"
