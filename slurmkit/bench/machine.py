"""What a measurement ran on and with, and how much memory processes hold, as Linux says it in /proc."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

# A look at a tree of processes takes the kernel about a millisecond a process.
_LOOK_SECONDS = 0.5


def machine() -> dict[str, Any]:
    """The machine, as far as it says how figures compare."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory[1]) // 1024 if memory else 0,
        "gpus": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
    }


def circumstances() -> dict[str, float]:
    """What else went on when the measurement began: of figures taken on a busy machine little follows."""
    return {"load_average": round(os.getloadavg()[0], 2), "nice": os.getpriority(os.PRIO_PROCESS, 0)}


def versions() -> dict[str, str]:
    """Of what the figures depend on; the commit where the package lies in a git checkout."""
    found = {"python": platform.python_version()}
    for name in ("slurmkit", "torch", "transformers", "ray"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    commit = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return {**found, "commit": commit} if commit else found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def reset_peak_resident() -> None:
    """Count this process's peak from here on (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mib() -> float:
    """The resident memory of this process, in MiB."""
    return _field("/proc/self/status", "VmRSS")


def peak_resident_mib(process: int | str = "self") -> float:
    """The most resident memory that a process ever had, in MiB; 0 when it is gone."""
    return _field(f"/proc/{process}/status", "VmHWM")


class WatchedTree:
    """The memory of a process and all its descendants while the context lasts, looked at twice a second.

    `peak_mib` is the largest sum of proportional set sizes: what processes share counts once. `largest_process_mib` is
    the largest resident peak of one process.
    """

    def __init__(self, root: int) -> None:
        self.peak_mib = self.largest_process_mib = 0.0
        self._root = root
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._end.wait(_LOOK_SECONDS):
            tree = _tree(self._root)
            self.peak_mib = max(self.peak_mib, sum(_field(f"/proc/{each}/smaps_rollup", "Pss") for each in tree))
            self.largest_process_mib = max([self.largest_process_mib, *map(peak_resident_mib, tree)])

    def __enter__(self) -> WatchedTree:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


def _tree(root: int) -> list[int]:
    found = [root]
    for process in found:  # grows while it is walked
        with suppress(OSError):
            for task in Path(f"/proc/{process}/task").iterdir():
                with suppress(OSError):
                    found += map(int, (task / "children").read_text().split())
    return found


def _field(path: str, name: str) -> float:
    """A line `NAME: 123 kB` of a file in /proc, in MiB."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0
