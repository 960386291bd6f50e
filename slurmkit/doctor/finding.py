"""What a check takes and gives, and the two tools that checks share. Standard library only: it also runs on nodes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Result = Literal["ok", "warn", "fail"]
# From harmless to worst.
RESULTS: tuple[Result, ...] = ("ok", "warn", "fail")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Subject:
    """What the checks are about. Example: Subject("/venv/bin/python", "/scratch/me", "none", "gpu", False)."""

    python: str
    """The interpreter that jobs will use."""

    results: str
    """The directory that run directories are made in, or the nearest one above it that exists."""

    runtime: str
    """The container runtime of jobs, or `none`."""

    partition: str | None
    on_node: bool
    """Whether this is a node of an allocation, in contrast to a login node or a laptop."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the answer. Example: Finding("warn", "0.5 GiB free", "ask for a larger one", what="/dev/shm")."""

    result: Result
    found: str
    advice: str = ""
    same: str = ""
    """What must be equal on all nodes of a job, such as a version."""

    what: str = ""
    """The check's name; the registry fills it in."""


Check = Callable[[Subject], Finding | None]


class Checks(dict[str, Check]):
    """Checks by name, in the order in which they were defined, which is the order of a job's life."""

    def __call__(self, what: str) -> Callable[[Check], Check]:
        """Decorate a check. It gives None where it does not apply."""

        def register(check: Check) -> Check:
            self[what] = check
            return check

        return register

    def run(self, subject: Subject) -> Iterator[Finding]:
        """One finding after the other. A machine too strange for a check is a warning, and the others go on."""
        for what, check in self.items():
            try:
                finding = check(subject)
            except (OSError, ValueError) as error:
                finding = Finding("warn", f"cannot be checked here: {error}")
            if finding is not None:
                yield replace(finding, what=what)


def ask(*command: str, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    """Run a command to its end or the deadline. As a shell has it, 127 is not found and 124 no answer in time."""
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {error.strerror}")
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Killed, and not waited for: what hangs in the kernel, as nvidia-smi does when a GPU is lost, does not end.
        os.killpg(child.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} gave no answer within {seconds:g} s")
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said last, for a finding."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"{done.args[0]} ended with exit code {done.returncode}"


def file_system(path: Path) -> str:
    """The type of the file system that holds a path, such as ext4, nfs4 or lustre."""
    real = os.path.realpath(path)
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        if len(mount) >= len(best) and (real + "/").startswith(mount.rstrip("/") + "/"):
            best, kind = mount, after.split()[0]
    return kind


def is_shared(kind: str) -> bool:
    """Whether file systems of this type are usually seen by all nodes."""
    network = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "wekafs", "panfs", "pvfs", "orangefs", "afs")
    return kind.startswith((*network, "fuse.", "9p", "virtiofs", "glusterfs", "gfs2", "ocfs2", "daos"))
