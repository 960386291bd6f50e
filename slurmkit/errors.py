"""The ways in which slurmkit gives up, and the exit codes that tell them apart."""

from __future__ import annotations

# Exit code of a driver that was asked to leave and has: everything is saved, and going on loses nothing.
INTERRUPTED = 85


class SlurmkitError(Exception):
    """Anything that ends a command with one message and no traceback."""

    exit_code = 1


class UserError(SlurmkitError):
    """The user can put it right: a key, a value, a path, a flag. Exit code 2."""

    exit_code = 2


class Failure(SlurmkitError):
    """Something outside gave way: sbatch refused, a disk is full, a deadline passed. Exit code 1."""


class NodeFailure(Failure):
    """A node, Ray or one of its processes is gone: the same may work elsewhere. Exit code 75."""

    exit_code = 75
