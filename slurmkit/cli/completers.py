"""Shell completion of values: keys of a job, partitions, accounts, profiles."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click

from slurmkit.errors import SlurmkitError

# Seconds for an answer of Slurm's: somebody waits at a prompt.
_DEADLINE = 2


def keys(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the keys of a job that begin so, each with its equals sign."""
    from slurmkit.config.validate import known_keys
    from slurmkit.job.spec import JobSpec

    if "=" in incomplete:
        return []
    return [f"{key}=" for key in known_keys(JobSpec) if key.startswith(incomplete)]


def partitions(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the cluster's partitions that begin so; none if Slurm does not answer in time."""
    return _from_slurm(incomplete, "sinfo", "-h", "-o", "%R")


def accounts(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the user's own accounts that begin so; none if there is no accounting, or it does not answer in time."""
    who = f"user={getpass.getuser()}"
    return _from_slurm(incomplete, "sacctmgr", "-nP", "show", "associations", who, "format=account")


def _from_slurm(incomplete: str, *command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [name for name in dict.fromkeys(done.stdout.split()) if name.startswith(incomplete)]


def profiles(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the profiles of the site's, the user's and the project's file that begin so."""
    try:
        return sorted({name for name in _profiles() if name.startswith(incomplete)})
    except SlurmkitError:
        return []


def _profiles() -> Iterator[str]:
    from slurmkit.job.layers import read_layers, site_file

    for layer in read_layers(None, Path.cwd()):
        found = layer.source.data.get("profiles")
        yield from map(str, found if isinstance(found, dict) else ())
    path = site_file()
    if path is not None:
        from slurmkit.job.site import read_site

        yield from read_site(path).rules.profiles
