"""The driver as a user starts it, on a private Ray, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.requirements import REPOSITORY

TINY = REPOSITORY / "tests" / "grpo" / "tiny.yaml"
# Every step is saved and stays, so that any step of another run with the same numbers can be compared with it.
EVERY_STEP = ("checkpointing.keep_top_k=null", "checkpointing.metric_name=train:reward_mean")
CANARY = "canary-7f3a-must-not-leave"


@dataclass(frozen=True)
class Run:
    code: int
    output: str
    errors: str
    folder: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]


def start(
    folder: Path, config: Path, *overrides: str, new_session: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """`new_session`: as a leader of its own process group, so that a signal can be sent to all of it."""
    inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "slurmkit.grpo", f"--config={config}"]
    return subprocess.Popen(
        [*command, f"checkpointing.checkpoint_dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | {"SOME_SECRET": CANARY} | environment,
        start_new_session=new_session,
    )


def ended(process: subprocess.Popen[str], folder: Path, timeout: float = 300) -> Run:
    """What became of a driver. One that takes too long is ended."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate(timeout=30)
        raise
    return Run(process.returncode, output, errors, folder)


def run(folder: Path, config: Path, *overrides: str, timeout: float = 300, **environment: str) -> Run:
    return ended(start(folder, config, *overrides, **environment), folder, timeout)


def until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 200) -> None:
    """Wait for a moment in a driver's life, as closely as one can."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.001)


def without_times(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what another machine, or another moment, would have otherwise."""
    of_machine = ("time:", "perf:", "train:peak_memory_gib")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(of_machine)} for line in lines]


def last_logged(folder: Path) -> int:
    """The last step of which metrics.jsonl has a line; -1 before the first."""
    path = folder / "metrics.jsonl"
    # A line that is just being written may be seen in part.
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


@contextmanager
def two_ray_nodes(folder: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    """Ray's address and the raylets of two nodes, the head's first, on this machine."""
    program = (
        "from ray.cluster_utils import Cluster\n"
        "cluster = Cluster(True, head_node_args={'num_cpus': 1, 'include_dashboard': False})\n"
        "cluster.add_node(num_cpus=1)\n"
        "print(cluster.address, flush=True)\n"
        "input()\n"
    )
    with (folder / "cluster.log").open("w") as log:
        cluster = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert cluster.stdout is not None
    address = cluster.stdout.readline().strip()
    children = psutil.Process(cluster.pid).children(recursive=True)
    try:
        yield address, children
    finally:
        cluster.kill()
        cluster.wait()
        for child in children:
            if child.is_running():
                child.kill()


def processes_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The driver's Ray, with its actors, in no order."""
    return psutil.Process(driver.pid).children(recursive=True)


def titled(processes: list[psutil.Process], title: str) -> psutil.Process:
    """The one process whose command line begins with `title`: Ray names an actor's after its class and method."""
    (found,) = [each for each in processes if _title(each).startswith(title)]
    return found


def does(process: psutil.Process, title: str) -> bool:
    """Whether an actor is inside the method that `title` names, as `ray::Class.method`."""
    return _title(process).startswith(title)


def _title(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def nothing_left_behind(seconds: float = 60) -> Iterator[None]:
    """Of what is made inside, where everybody does; what another test's engine makes as it starts is gone soon."""
    before = _made_by_everybody()
    yield
    deadline = time.monotonic() + seconds
    while left := _made_by_everybody() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def all_end(processes: Iterable[psutil.Process], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while left := [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _made_by_everybody() -> set[Path]:
    """What vLLM and multiprocessing make in places that all share."""
    in_memory = {path for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "sem.mp-"))}
    return in_memory | {path for path in Path("/tmp").iterdir() if path.is_socket() or path.name.startswith("vllm")}
