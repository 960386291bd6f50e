"""Some minutes of benchmarks/soak.py: a run that is killed again and again ends as one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.requirements import REPOSITORY, need_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.faults, pytest.mark.nightly]


def test_a_run_killed_at_random_times_ends_like_an_undisturbed_run(tmp_path: Path) -> None:
    need_slurm()
    figures = tmp_path / "figures.json"
    # Kills come early, or a quick machine finishes 120 steps before the first of them.
    schedule = ["--minutes", "3", "--steps", "120", "--seed", "1", "--within", "6"]
    soak = [sys.executable, REPOSITORY / "benchmarks/soak.py", *schedule]
    # timeout's SIGTERM lets it take its cluster down.
    command = ["timeout", "540", *soak, "--json", figures]
    # Where other tests have imported torch here, it has set this one, which would be handed on to the jobs.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["problems"] == []
    assert found["summary"]["steps"] == 120
    assert found["summary"]["attempts"] >= 2
