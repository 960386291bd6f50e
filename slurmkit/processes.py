"""Processes of which none is left if another one is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

# From linux/prctl.h: the signal that the kernel sends this process when its parent has ended.
_PR_SET_PDEATHSIG = 1


def become(module: str, *arguments: str) -> NoReturn:
    """Run `python -m MODULE ARGUMENTS...` in this process's place: signals, also SIGKILL, reach it directly."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends. A `preexec_fn`, for children that the main thread starts.

    The kernel takes the thread that started the child for the parent (prctl(2)).
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
