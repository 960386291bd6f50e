"""The files in which the parts of one attempt meet: each fact is one small file, written beside and renamed."""

import json
import os
import subprocess
import sys
from typing import Any, Dict, Optional

# Seconds between two signs of life of a node, and between two looks at those of all nodes.
BEAT = 2.0
# Exit codes of a job: the nodes failed and not the command; all is saved; cancelled.
NODES_FAILED, INTERRUPTED, CANCELLED = 75, 85, 143


def text_of(path: str) -> str:
    """A small file's text, "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def write(path: str, text: str) -> None:
    """Readers see the whole text or none of it."""
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(beside, path)


def size_of(path: str) -> int:
    """Bytes, -1 where there is no such file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def ask(*command: str, timeout: float = 20.0) -> Optional[str]:
    """What one of Slurm's commands prints; None where it fails or does not answer in time."""
    try:
        done = subprocess.run(
            ["timeout", str(timeout), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


class Meeting:
    """The files of one attempt."""

    def __init__(self) -> None:
        self.attempt = os.environ["SK_ATTEMPT"]
        self.folder = os.environ["SK_ATTEMPT_DIR"]
        self.meet = os.environ["SK_MEET"]
        self.run = os.path.dirname(os.path.dirname(self.folder))

    def of(self, kind: str) -> Dict[str, str]:
        """What nodes have published as KIND.NAME: text by name."""
        try:
            names = sorted(name for name in os.listdir(self.meet) if name.startswith(kind + "."))
        except OSError:
            return {}
        return {name[len(kind) + 1 :]: text_of(os.path.join(self.meet, name)) for name in names}

    def text(self, name: str) -> str:
        """The text of one fact, "" where there is none."""
        return text_of(os.path.join(self.meet, name))

    def has(self, name: str) -> bool:
        """Whether it was published."""
        return os.path.exists(os.path.join(self.meet, name))

    def publish(self, name: str, text: str = "") -> None:
        """Tell it to whoever looks."""
        write(os.path.join(self.meet, name), text)

    def record(self, name: str, facts: Dict[str, Any]) -> None:
        """Write start.json or end.json."""
        write(os.path.join(self.folder, name), json.dumps(facts))


def tell(text: str, to: Any = None) -> None:
    """Into the job's output."""
    print("slurmkit: " + text, file=to or sys.stdout, flush=True)
