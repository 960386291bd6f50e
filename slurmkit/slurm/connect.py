"""Which way to Slurm."""

from __future__ import annotations

import sys

from slurmkit.errors import UserError
from slurmkit.slurm.client import SlurmClient
from slurmkit.slurm.command import CommandClient


def connect(kind: str = "auto", python: str = sys.executable) -> SlurmClient:
    """The client of that kind; UserError for an unknown kind, and without sbatch on PATH.

    `command` is Slurm's own commands, and `auto` is that too: nobody gets pyslurm without asking. `pyslurm` reads and
    controls jobs through pyslurm in the interpreter `python`, and falls back to the commands where that cannot be.
    """
    if kind in ("auto", "command"):
        return CommandClient()
    if kind == "pyslurm":
        from slurmkit.slurm.native import NativeClient

        return NativeClient(CommandClient(), python)
    raise UserError(f"{kind!r} is no way to reach Slurm: it is auto, command or pyslurm")
