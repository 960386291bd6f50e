"""The files in which the parts of one attempt meet: each fact is one small file, written beside and renamed."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any, Dict, List, Optional, Tuple


def _heartbeat() -> float:
    """Return SLURMKIT_HEARTBEAT in seconds, which tests set: 2 if it is not set."""
    text = os.environ.get("SLURMKIT_HEARTBEAT", "2")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 60:
        sys.exit(f"error: SLURMKIT_HEARTBEAT={text} is not a number of seconds above 0 and up to 60")
    return seconds


# Seconds between two signs of life of a node, and between two looks at those of all nodes.
BEAT = _heartbeat()
# Exit codes of a job: the nodes failed and not the command; all is saved; cancelled.
NODES_FAILED, INTERRUPTED, CANCELLED = 75, 85, 143
# Bytes that a reserved file holds, and the errors of a file system or a quota without space.
RESERVED = 16384
_FULL = (errno.ENOSPC, errno.EDQUOT)
# The code of timeout(1), and the errors of Slurm's commands if slurmctld is away (src/common/slurm_errno.c).
NO_ANSWER = 124
_NO_ANSWER = (
    "Unable to contact|Connection refused|Connection reset|timed out|standby mode|Zero Bytes were|"
    "ommunication connection failure|essage send failure|essage receive failure|Transport endpoint is not"
)


def text_of(path: str) -> str:
    """A small file's text, "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def write(path: str, text: str) -> None:
    """Write a file atomically. If there is no space, use the space that `reserve` has taken."""
    folder, name = os.path.split(path)
    beside, reserved = os.path.join(folder, f".{name}.{os.getpid()}"), reserved_for(path)
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        with suppress(OSError):
            os.remove(beside)
        if error.errno not in _FULL or not os.path.exists(reserved):
            raise
        beside = reserved
        with open(beside, "r+", encoding="utf-8") as file:  # in place: its blocks are allocated already
            file.write(text + "\n")
    os.replace(beside, path)


def reserved_for(path: str) -> str:
    """Return the path of the file that holds the space for another one."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.reserved")


def reserve(path: str) -> None:
    """Allocate the space of a small file that must be written even if the file system is full by then."""
    with open(reserved_for(path), "w", encoding="utf-8") as file:
        file.write("\n" * RESERVED)  # readers strip what a shorter text leaves of it


def size_of(path: str) -> int:
    """Bytes, -1 where there is no such file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def ask(*command: str, timeout: float = 20.0) -> Optional[str]:
    """Return what one of Slurm's commands prints; None if it fails or does not answer in time."""
    code, answer, _ = attempt_to_ask(*command, timeout=timeout)
    return answer if code == 0 else None


def attempt_to_ask(*command: str, timeout: float = 20.0) -> Tuple[int, str, str]:
    """Return a Slurm command's exit code, output and errors; the code is NO_ANSWER if slurmctld does not answer."""
    try:
        done = subprocess.run(  # noqa: UP022 -- Python 3.6 has no capture_output
            ["timeout", str(timeout), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        return 127, "", str(error)
    answer, errors = (text.decode(errors="replace").strip() for text in (done.stdout, done.stderr))
    is_silent = done.returncode != 0 and re.search(_NO_ANSWER, errors) is not None
    return NO_ANSWER if is_silent else done.returncode, answer, errors


class Meeting:
    """The files of one attempt."""

    def __init__(self) -> None:
        self.attempt = os.environ["SK_ATTEMPT"]
        self.folder = os.environ["SK_ATTEMPT_DIR"]
        self.meet = os.environ["SK_MEET"]
        self.run = os.path.dirname(os.path.dirname(self.folder))
        self.nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        self.full = ""
        """The last error of a file system or quota without space, "" if there was none."""

    def of(self, kind: str) -> Dict[str, str]:
        """Return what nodes have published as KIND.NAME: text by name."""
        try:
            names = sorted(name for name in os.listdir(self.meet) if name.startswith(kind + "."))
        except OSError:
            return {}
        return {name[len(kind) + 1 :]: text_of(os.path.join(self.meet, name)) for name in names}

    def text(self, name: str) -> str:
        """The text of one fact, "" where there is none."""
        return text_of(os.path.join(self.meet, name))

    def has(self, name: str) -> bool:
        """Return whether it was published."""
        return os.path.exists(os.path.join(self.meet, name))

    def publish(self, name: str, text: str = "", patience: float = 0.0) -> bool:
        """Publish a fact. False if there was no space for it for `patience` seconds."""
        deadline = time.monotonic() + patience
        while not self._write(os.path.join(self.meet, name), text):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)
        return True

    def make(self) -> bool:
        """Create the folder of the facts. False if there was no space for it."""
        try:
            os.makedirs(self.meet, exist_ok=True)
        except OSError as error:
            self._raise_unless_full(error)
            return False
        return True

    def record(self, name: str, facts: Dict[str, Any]) -> bool:
        """Write start.json or end.json. False if there was no space for it."""
        return self._write(os.path.join(self.folder, name), json.dumps(facts))

    def _write(self, path: str, text: str) -> bool:
        try:
            write(path, text)
        except OSError as error:
            self._raise_unless_full(error)
            return False
        return True

    def _raise_unless_full(self, error: OSError) -> None:
        if error.errno not in _FULL:
            raise error
        self.full = f"no space left on {self.run} ({error.strerror})"

    def has_space(self) -> bool:
        """Return whether the run directory takes some more data."""
        path = os.path.join(self.folder, f".space.{os.getpid()}")
        try:
            with open(path, "wb") as file:
                file.write(b" " * 4 * RESERVED)
        except OSError as error:
            self._raise_unless_full(error)
            return False
        finally:
            with suppress(OSError):
                os.remove(path)
        return True

    def reserve(self) -> None:
        """Allocate the space for the attempt's end."""
        with suppress(OSError):
            for path in self._reserved():
                reserve(path)

    def release(self) -> None:
        """Free what `reserve` has allocated."""
        for path in self._reserved():
            with suppress(OSError):
                os.remove(reserved_for(path))

    def _reserved(self) -> List[str]:
        names = ["end.json", "next"]
        return [os.path.join(self.folder, name) for name in names] + [os.path.join(self.meet, "code")]


def tell(text: str, to: Any = None) -> None:
    """Write a line to the job's output, which may be on a full file system."""
    show("slurmkit: " + text, to)


def show(text: str, to: Any = None) -> None:
    """Write text to the job's output, unless there is no space for it."""
    with suppress(OSError):
        print(text, file=to or sys.stdout, flush=True)
