"""The command line as a user meets it: one message, the right exit code, no traceback, nothing written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from parts import REPOSITORY, SLURMKIT

EXAMPLE = REPOSITORY / "examples" / "grpo_arithmetic.yaml"


def slurmkit(here: Path, *arguments: str | Path, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SLURMKIT, *arguments],
        cwd=here,
        env={**os.environ, "PATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit"], "nothing to run"),
        (["submit", "--"], "nothing follows --"),
        (["submit", "--nodes", "0", "--", "true"], "nodes: should be greater than or equal to 1, not 0"),
        (["submit", "--nodes", "many", "--", "true"], "'many' is not a valid integer"),
        (["submit", "--nodse", "2", "--", "true"], "No such option '--nodse'"),
        (["submit", "--config", "none.yaml"], "none.yaml: no such file"),
        (
            ["submit", "--config", EXAMPLE, "grpo.num_promts_per_step=4"],
            "nearest known key is grpo.num_prompts_per_step",
        ),
        (["submit", "--config", EXAMPLE, "grpo.seed=one"], "grpo.seed: should be a valid integer, not 'one'"),
        (["submit", "a.yaml", "b.yaml"], "one run file at most"),
        (["submit", "--env", "X", "--", "true"], "--env 'X': write NAME=VALUE"),
        (["submit", "--set", "nodes=[", "--", "true"], "--set nodes=[: not a YAML value"),
        (
            ["submit", "--nodes", "2", "--set", "nodes.x=1", "--", "true"],
            "nodes: should be a valid integer, not {'x': 1}",
        ),
        (["submit", "--name", "../x", "--", "true"], "cannot be a run's name"),
        (["submit", "--time", "soon", "--", "true"], "'soon' is not a Slurm time"),
        (["render", "--out", "no/such/dir/x", "--", "true"], "no/such/dir/x cannot be written"),
        (["run"], "nothing to run"),
        (["run", "--nodes", "2", "--", "true"], "No such option '--nodes'"),
        (["traim"], "No such command 'traim'"),
    ],
)
def test_a_mistake_gets_one_message_and_leaves_nothing(here: Path, arguments: list[str | Path], message: str) -> None:
    done = slurmkit(here, *arguments)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if "cannot be written" in message else 2)
    assert list(here.iterdir()) == []


def test_without_slurm_submit_says_what_to_do_instead(here: Path) -> None:
    done = slurmkit(here, "submit", "--", "true", path="/nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        "error: sbatch is not on PATH: submit from a login node of a Slurm cluster, or run here without Slurm: "
        "slurmkit run\n"
    )


def test_render_writes_the_bytes_that_it_prints(here: Path) -> None:
    printed = slurmkit(here, "render", "--config", EXAMPLE, "--nodes", "2").stdout
    done = slurmkit(here, "render", "--config", EXAMPLE, "--nodes", "2", "--out", "job file.sbatch")
    assert done.returncode == 0, done.stderr
    assert (here / "job file.sbatch").read_text() == printed
    assert [path.name for path in here.iterdir()] == ["job file.sbatch"]
