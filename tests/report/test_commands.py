"""slurmkit report and slurmkit watch, as a user calls them, without Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.report_runs import write_steps
from tests.support.requirements import SLURMKIT
from tests.support.run_directories import Made

# No sbatch there.
ENVIRONMENT = {**os.environ, "PATH": str(SLURMKIT.parent), "COLUMNS": "200"}


def slurmkit(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SLURMKIT, *arguments], cwd=here, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def runs(here: Path) -> Path:
    """One run that is done and one that failed on a node."""
    done, failed = here / "results/done", here / "results/failed"
    Made(done).record("13").start("13.0", 900).end("13.0", 500, 0, "the command is done")
    reason = {"reason": "node node2: its raylet died", "bad_nodes": ["node2"]}
    Made(failed).record("14").start("14.0", 900).end("14.0", 500, 75, **reason)
    for run in (done, failed):
        write_steps(run, 20)
    return here


def test_a_run_s_page_is_in_its_folder_and_says_what_ended_each_attempt(runs: Path) -> None:
    done = slurmkit(runs, "report", "14")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{runs}/results/failed/report.html\n"
    page = (runs / "results/failed/report.html").read_text()
    assert "node node2: its raylet died (exit code 75)" in page
    assert '<span class="node">node2</span>' in page
    assert "#SBATCH --job-name=failed" in page
    assert "<dd>20 of 20</dd>" in page


def test_several_runs_get_one_page_where_it_is_asked_for(runs: Path) -> None:
    assert slurmkit(runs, "report", "done", "failed").stdout == f"{runs}/report.html\n"
    assert slurmkit(runs, "report", "done", "failed", "--out", "two.html").stdout == f"{runs}/two.html\n"
    page = (runs / "two.html").read_text()
    assert "./results/done/metrics.jsonl" in page
    assert "./results/failed/metrics.jsonl" in page


def test_a_page_is_made_without_the_trainer_s_libraries(runs: Path) -> None:
    code = "import sys\nfrom slurmkit.cli.main import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "done"], cwd=runs, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert not {"numpy", "matplotlib", "torch", "ray", "pydantic", "rich"} & set(done.stderr.split())


@pytest.mark.parametrize("command", ["report", "watch"])
def test_a_run_that_is_none_is_refused_with_the_nearest_name(runs: Path, command: str) -> None:
    done = slurmkit(runs, command, "failled")
    assert done.returncode == 2
    assert "failed" in done.stderr


@pytest.mark.parametrize(("name", "code"), [("done", 0), ("failed", 75)])
def test_watching_ends_with_the_run_and_its_exit_code(runs: Path, name: str, code: int) -> None:
    done = slurmkit(runs, "watch", name)
    assert (done.returncode, done.stderr) == (code, "")
    state, step = done.stdout.splitlines()
    assert state == ("done: done" if name == "done" else "failed: failed: node node2: its raylet died")
    assert step == "step 20/20  reward 0.67  accuracy 0.67  0:00 left"
