"""What a run has used up: from accounting, and from its files where there is none."""

from __future__ import annotations

import json
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slurmkit.errors import Failure
from slurmkit.run.usage import usage_of
from slurmkit.slurm.client import JobUsage
from tests.support.requirements import SLURMKIT
from tests.support.run_directories import Made, Slurm


def at(age: float) -> str:
    return datetime.fromtimestamp(1.9e9 - age).isoformat()


def booked(job_id: str, eligible: float, start: float, seconds: int, **facts: Any) -> JobUsage:
    known = {"name": "run", "nodes": 2, "gpus": 16, "cpu_seconds": 4000, "cpu_seconds_used": 1000.0, **facts}
    return JobUsage(job_id=job_id, eligible=at(eligible), start=at(start), seconds=seconds, **known)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """12 made steps 1 to 3 in 10 s each and lost its node; 14 went on after step 1, saved and left; 16 runs."""
    made = Made(tmp_path / "run", "gres=gpu:h100:8").record("12", "16")
    log = "step 0/10  accuracy 0.100\n" + "".join(f"step {step}/10  reward 0.1  10.00 s\n" for step in (1, 2, 3))
    made.start("12.0", 8000).put("12.0", "driver.log", log + "oh\n", 5000)
    made.end("12.0", 4400, 75, "node node2: its raylet died", goes_on=True).put("12.0", "next", "14")
    log = "step 2/10  11.00 s\nstep 3/10  11.00 s\nstep 4/10  11.00 s\n"
    made.start("14.0", 4000, previous="12", nodes="node3").put("14.0", "driver.log", log, 3000).end("14.0", 2200, 85)
    made.start("16.0", 1000).alive("16.0", 1)
    return made.steps(*[{"time:step": seconds} for seconds in (10.0, 11.0, 11.0, 12.0)])


def test_the_files_tell_hours_waits_lost_work_and_efficiency(made: Made) -> None:
    usage, problem = usage_of(made.path, None)
    assert problem is None
    one, two, three = usage.attempts
    assert {each.source for each in usage.attempts} == {"files"}
    assert (one.elapsed, one.nodes, one.gpus) == (3600, 2, 16)
    assert (one.node_hours, one.gpu_hours) == (2.0, 16.0)
    # 10 minutes after its last word, and steps 2 and 3, which 14 made again.
    assert one.lost == 600 + 20
    assert (two.elapsed, two.nodes, two.gpus, two.gpu_hours) == (1800, 1, 8, 4.0)
    assert (two.waited, two.lost) == (400, 0), "it waited from the end of the one before, and saved everything"
    assert (one.waited, three.waited, three.lost) == (None, None, None)
    assert three.elapsed == pytest.approx(1000 + time.time() - made.now, abs=5)
    assert usage.in_steps == 44
    assert usage.efficiency == pytest.approx(44 / usage.elapsed)
    assert usage.gpu_hours == pytest.approx(20 + three.gpu_hours)


def test_accounting_comes_first_for_each_job_that_it_knows(made: Made) -> None:
    slurm = Slurm(
        usage=[
            booked("12", 9000, 8001, 3590),
            booked("14", 4390, 4000, 1800, cpu_seconds_used=None),
            booked("16", 9, 9, 9, name="a stranger"),
            booked("99", 9, 9, 9),
        ]
    )
    usage, _ = usage_of(made.path, slurm)
    assert [(each.name, each.source) for each in usage.attempts] == [
        ("12.0", "sacct"),
        ("14.0", "sacct"),
        ("16.0", "files"),
    ]
    one, two, _ = usage.attempts
    assert (one.waited, one.elapsed, one.cpu_efficiency) == (999, 3590, 0.25)
    assert (two.waited, two.cpu_efficiency, two.gpus) == (390, None, 16)


def test_each_start_of_a_requeued_job_and_a_follow_up_without_work_count(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").record("12").start("12.0", 900).start("12.1", 500).end("12.1", 100, 0)
    made.put("12.1", "next", "14").start("14.0", 90, previous="12").end("14.0", 89, 0)
    slurm = Slurm(usage=[booked("12", 950, 900, 300), booked("12", 600, 500, 400), booked("14", 95, 90, 1)])
    usage, _ = usage_of(made.path, slurm)
    assert [(each.name, each.elapsed) for each in usage.attempts] == [("12.0", 300), ("12.1", 400), ("14.0", 1)]
    assert (usage.lost, usage.efficiency) == (None, None), "nobody knows of steps"


def test_without_an_answer_from_accounting_the_files_tell(made: Made) -> None:
    class Away(Slurm):
        def usage(self, *_: object) -> tuple[()]:
            raise Failure("slurmdbd is away")

    usage, problem = usage_of(made.path, Away())
    assert problem == "slurmdbd is away"
    assert usage.attempts[0].gpu_hours == 16.0


def test_the_cost_is_that_of_the_site_s_file(made: Made) -> None:
    site = made.path.parent / "site.yaml"
    site.write_text("price: {per_gpu_hour: 2.5, per_node_hour: 0.5, currency: EUR}\n")
    made.end("16.0", 1000, 0)
    environment = {"PATH": str(SLURMKIT.parent), "SLURMKIT_SITE": str(site)}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SLURMKIT, *words], env=environment, capture_output=True, text=True, timeout=60)

    done = run("usage", made.path)
    assert done.stdout.endswith("cost           51.25 EUR\n"), done.stderr
    found = json.loads(run("usage", made.path, "--json").stdout)
    assert (found["cost"], found["currency"], found["gpu_hours"]) == (20 * 2.5 + 2.5 * 0.5, "EUR", 20.0)
    assert run("site", "lint", site).returncode == 0
    site.write_text("price: {per_gpu_hour: -1, per_day: 3}\n")
    refused = run("site", "lint", site)
    assert refused.returncode == 2
    for key in ("price.per_gpu_hour", "price.per_day", "price.currency"):
        assert key in refused.stderr
