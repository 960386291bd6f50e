"""On every node: its sign of life, its stacks, and what was killed for memory."""

import os
import re
import shutil
import signal
import threading
import time
from contextlib import suppress
from typing import Any, Dict, Iterator, Optional, Tuple

from slurmkit.keeper.meeting import BEAT, Meeting, size_of, text_of, write
from slurmkit.keeper.stand_in import StandIn

# Seconds for which a command may end by itself after Ray has lost a node.
GRACE = 2.5 * BEAT
# Seconds for which processes may write their stacks, after which they end: less than the first node waits for them.
DUMP = 15.0


class Node:
    """One node's part. It ends with the shell that started it, or when that tells it to leave (HUP)."""

    def __init__(self, meeting: Meeting, stand_in: Optional[StandIn] = None, root: str = "/sys/fs/cgroup") -> None:
        self._meeting = meeting
        self._stand_in = stand_in
        self._root = root
        self._name = os.environ["SLURMD_NODENAME"]
        self._rank = int(os.environ["SLURM_NODEID"])
        self._scratch = "/tmp/sk-" + meeting.attempt
        self._kills = self.killed_for_memory()
        self._is_leaving = False
        self._has_stacks = False
        self._read: Optional[int] = None
        self._dead: Dict[str, float] = {}
        signal.signal(signal.SIGHUP, self._leave)

    def _leave(self, *_: Any) -> None:
        self._is_leaving = True

    def run(self) -> None:
        """Beat until the node's shell leaves."""
        shell, beat, due = os.getppid(), 0, 0.0
        if "SLURM_ARRAY_JOB_ID" not in os.environ:  # whose tasks share a run directory
            # In the background, as a node may go for some seconds only without a sign of life.
            threading.Thread(target=self.remove_leftovers, daemon=True).start()
        while not self._is_leaving and os.getppid() == shell:
            if time.monotonic() >= due:
                beat, due = beat + 1, time.monotonic() + BEAT
                is_written = self._meeting.publish(f"alive.{self._rank}", f"{self._name} {beat}")
                # On a full file system no node can give a sign of life.
                if is_written and self._stand_in and not self._meeting.of("failed"):
                    self._stand_in.look()
            if self._rank == 0:
                self.look_at_ray()
            if self._meeting.has("stacks") and not self._has_stacks:
                self._has_stacks = True
                self.write_stacks()
            time.sleep(0.2)
        if self._is_leaving:
            if self._rank == 0:
                self.look_at_ray(is_last=True)
            for text in self.memory_reports():
                self._meeting.publish("killed." + self._name, text)
            self._meeting.publish(f"leaving.{self._rank}")  # no sign of life is due any more

    def look_at_ray(self, is_last: bool = False) -> None:
        """On the first node: report the nodes that Ray's GCS has marked dead since the command started.

        A node whose raylet hangs, or that has no network, may still write its signs of life. The command gets some
        seconds to fail by itself, as its own message may say more.
        """
        if not self._meeting.has("started"):
            return  # a raylet that died and was started again in bring-up is no loss
        path = os.path.join(self._scratch, "r/session_latest/logs/gcs_server.out")
        if self._read is None or size_of(path) < self._read:
            self._read = max(0, size_of(path)) if self._read is None else 0
        with suppress(OSError), open(path, "rb") as log:
            log.seek(self._read)
            *whole, _ = log.read().split(b"\n")
            self._read += sum(len(line) + 1 for line in whole)
            for line in whole:
                found = re.search(rb"address: (\S+) and node name: \S+ has been marked dead", line)
                if found:
                    self._dead.setdefault(found.group(1).decode(), time.monotonic() + GRACE)
        for address, due in self._dead.items():
            if not is_last and time.monotonic() < due:
                continue
            name = self._node_at(address)
            if not self._meeting.has("failed." + name):
                reason = "Ray has marked it dead, as it did not answer"
                self._meeting.publish("bad." + name, reason)
                self._meeting.publish("failed." + name, reason)

    def _node_at(self, address: str) -> str:
        """The node's name, from what it has published when it was ready."""
        for text in self._meeting.of("ready").values():
            if text.split()[1:2] == [address]:
                return text.split()[0]
        return self._name if self._meeting.text("head").startswith(address + ":") else address

    def remove_leftovers(self) -> None:
        """Remove what attempts of this run left here that were killed hard."""
        for name in os.listdir(os.path.dirname(self._meeting.folder)):
            if re.match(r"\d+\.\d+$", name) and name != self._meeting.attempt:
                shutil.rmtree("/tmp/sk-" + name, ignore_errors=True)

    def memory_reports(self) -> Iterator[str]:
        """Yield what Ray, and then the kernel, killed for memory since this began."""
        logs = os.path.join(self._scratch, "r/session_latest/logs")
        for name in ("raylet.out", "raylet.err"):
            found = re.search("Memory on the node .* limit", text_of(os.path.join(logs, name)))
            if found:
                yield "Ray killed a worker for memory: " + found.group()
                break
        if self.killed_for_memory() > self._kills:
            limit, peak = self._limit_and_peak()
            text = "a process was killed for memory: limit {} MiB, peak {} MiB"
            yield text.format(limit >> 20, peak >> 20)

    def _groups(self) -> Iterator[str]:
        """This process's memory cgroup and those above it, of version 1 or 2."""
        for line in text_of("/proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            root = os.path.join(self._root, "memory") if controllers == "memory" else self._root
            if controllers in ("memory", "") and size_of(os.path.join(root + path, "cgroup.procs")) >= 0:
                yield root + path
                while path != "/":
                    path = os.path.dirname(path)
                    yield root + path

    def killed_for_memory(self) -> int:
        """Processes that the kernel has killed in this process's cgroup."""
        for group in self._groups():
            for name in ("memory.oom_control", "memory.events"):
                found = re.search(r"^oom_kill (\d+)", text_of(os.path.join(group, name)), re.MULTILINE)
                if found:
                    return int(found.group(1))
        return 0

    def _limit_and_peak(self) -> Tuple[int, int]:
        """Bytes, of the lowest cgroup with a limit: the step's or the job's."""
        for group in self._groups():
            for limit, peak in (("limit_in_bytes", "max_usage_in_bytes"), ("max", "peak")):
                value = text_of(os.path.join(group, "memory." + limit))
                if value.isdigit() and int(value) < 1 << 60:
                    return int(value), int(text_of(os.path.join(group, "memory." + peak)) or 0)
        return 0, 0

    def write_stacks(self) -> None:
        """The stacks of all Python processes of the job: SIGABRT makes Python write them, which needs no GIL."""
        found = {pid: where for pid, where in _processes() if self._is_ours(where)}
        # Ray's own stay as they are from here on, or they would end what has not yet written its stacks.
        _signal_all(found, signal.SIGSTOP)
        pythons = {pid: where for pid, where in found.items() if _is_python(pid)}
        sizes = {pid: size_of(where) for pid, where in pythons.items()}
        _signal_all(pythons, signal.SIGABRT)
        _signal_all(pythons, signal.SIGCONT)
        deadline = time.monotonic() + DUMP
        while any(map(_is_running, pythons)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid, where in pythons.items():
            with suppress(OSError):  # the log is deleted, or a full file system takes some of them
                with open(where, "rb") as log:
                    log.seek(max(0, sizes[pid]))
                    text = log.read().decode(errors="replace").rstrip("\n")
                write(os.path.join(self._meeting.folder, f"stacks-{self._name}-{pid}.txt"), text)
        self._meeting.publish(f"stacks.{self._rank}")

    def _is_ours(self, where: str) -> bool:
        """Ray's workers overwrite their environment with their title: their messages go to the job's own files."""
        if where.startswith(self._scratch + "/"):
            return True
        try:
            return os.path.samefile(where, os.path.join(self._meeting.folder, "driver.log"))
        except OSError:
            return False


def _processes() -> Iterator[Tuple[int, str]]:
    """All on this node that this user may look at, each with the file that its messages go to."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended, or is somebody else's
            yield int(name), os.readlink(f"/proc/{name}/fd/2")


def _is_running(pid: int) -> bool:
    """Return whether the process has not ended. A zombie has."""
    return text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])


def _is_python(pid: int) -> bool:
    try:
        return re.search(r"/python[0-9.]*$", os.readlink(f"/proc/{pid}/exe")) is not None
    except OSError:
        return False


def _signal_all(pids: Any, number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
