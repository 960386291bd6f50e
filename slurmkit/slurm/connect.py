"""Which way to Slurm."""

from __future__ import annotations

import os
import sys

from slurmkit.errors import UserError
from slurmkit.slurm.client import SlurmClient
from slurmkit.slurm.command import CommandClient

KINDS = ("command", "pyslurm")


def connect(kind: str | None = None) -> SlurmClient:
    """The client of that kind, by default the one that SLURMKIT_CLIENT names, or else `command`.

    `command` is Slurm's own commands. `pyslurm` reads and controls jobs through pyslurm, in this interpreter or in the
    one that SLURMKIT_PYSLURM_PYTHON names, and falls back to the commands where that cannot be. UserError for an
    unknown kind, and without sbatch on PATH.
    """
    kind = kind or os.environ.get("SLURMKIT_CLIENT") or "command"
    if kind not in KINDS:
        raise UserError(f"SLURMKIT_CLIENT: {kind!r} is no way to reach Slurm: it is {' or '.join(KINDS)}")
    commands = CommandClient()
    if kind == "command":
        return commands
    from slurmkit.slurm.native import NativeClient

    return NativeClient(commands, os.environ.get("SLURMKIT_PYSLURM_PYTHON") or sys.executable)
