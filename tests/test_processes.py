"""No child outlives a command of slurmkit's that is killed. `slurmkit run` has a guard: run/test_local.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.requirements import SLURMKIT

# Each waits for a child, in the place of which `sleep` runs.
PARENTS = {
    "bench": "from slurmkit.bench.child import measured; measured('generate', {})",
    "sync": """from slurmkit.run.offline import OfflineRun, Path, upload
upload([OfflineRun(Path('x/y'), 'y', 1, False, False)], {'WANDB_API_KEY': 'x'})""",
    "nemo": "from slurmkit.evaluate.nemo import _run; _run([sys.executable], 'key')",
}


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", PARENTS)
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path, name: str) -> None:
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\nexec sleep 300\n")
    child.chmod(0o755)
    program = f"import sys\nsys.executable = {str(child)!r}\n"
    process = subprocess.Popen([sys.executable, "-c", program + PARENTS[name]], stdin=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    wait_for(parent.children)
    (started,) = parent.children()
    wait_for(lambda: started.name() == "sleep")
    process.kill()
    process.wait()
    wait_for(lambda: not started.is_running() or started.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["bench", "workplace"], "slurmkit.bench"),
        (["data", "workplace", "--tasks", "100000", "--out", "x"], "slurmkit.envs.workplace.generate"),
        (["export", ".", "x"], "slurmkit.grpo.export"),
    ],
)
def test_a_command_that_only_starts_another_becomes_it(tmp_path: Path, words: list[str], module: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    process = subprocess.Popen([SLURMKIT, *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        command = psutil.Process(process.pid)
        wait_for(lambda: module in " ".join([*command.cmdline(), *(" ".join(c.cmdline()) for c in command.children())]))
        assert module in command.cmdline()
    finally:
        process.kill()
        process.wait()
