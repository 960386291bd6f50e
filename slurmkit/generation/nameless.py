"""Shared memory that its processes have found each other in needs no name in /dev/shm any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

# The names that Python's multiprocessing gives, and what its tracker calls what bears them.
_KINDS = {"psm_": "shared_memory", "sem.mp-": "semaphore"}


def remove_names() -> None:
    """Unlink all that this process and those it has started share, so that nothing stays however they end.

    To be called when all of them have it open. vLLM itself unlinks only where it is shut down, not where it is killed.
    """
    mapped = {inode for pid in _family(os.getpid()) for inode in _mapped(pid)}
    for path in Path("/dev/shm").iterdir():
        kind = next((kind for start, kind in _KINDS.items() if path.name.startswith(start)), None)
        # By its number: of a semaphore, whoever made it has mapped another name.
        try:
            is_ours = kind is not None and path.stat().st_ino in mapped
        except FileNotFoundError:
            continue  # somebody else's, who has just removed it
        if is_ours and kind is not None:
            path.unlink()
            # Processes that were spawned share this one's tracker, which would look for the name at its end.
            resource_tracker.unregister(f"/{path.name.removeprefix('sem.')}", kind)


def _mapped(pid: int) -> Iterator[int]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return  # it has just ended
    for line in lines:
        if "/dev/shm/" in line:
            yield int(line.split()[4])


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))
