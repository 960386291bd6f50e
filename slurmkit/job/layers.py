"""The places in which a job's keys can be set, weakest first, each read with the line of every key.

packaged < site < user < project < profile < run file < SLURMKIT_* < flags. The packaged defaults are JobSpec's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.config.source import Source, merge, put, read_yaml
from slurmkit.config.validate import nearest, origin_of
from slurmkit.errors import UserError
from slurmkit.job.container import expand_places
from slurmkit.job.spec import JobSpec

PROJECT_FILE = "slurmkit.yaml"
_PATHS = ("config", "results_dir", "workdir", "python", "templates")
# SLURMKIT_… that say where to look, and set no key.
_NOT_KEYS = ("SITE", "PROFILE", "CLIENT", "PYSLURM_PYTHON", "DEVCLUSTER", "HEARTBEAT")


class Layer(NamedTuple):
    """One layer that was found. Example: Layer("project", Path("/p/slurmkit.yaml"), Source({"nodes": 2}, …))."""

    name: str
    path: Path | None
    source: Source


def site_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The site's file: SLURMKIT_SITE, or /etc/slurmkit/site.yaml if there is one. SLURMKIT_SITE= is none."""
    named = environ.get("SLURMKIT_SITE")
    if named is not None:
        return Path(named) if named else None
    path = Path("/etc/slurmkit/site.yaml")
    return path if path.is_file() else None


def user_file(environ: Mapping[str, str] = os.environ) -> Path:
    """The user's own defaults, which need not exist."""
    home = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "slurmkit", PROJECT_FILE)


def read_layers(run_file: Path | None, directory: Path, environ: Mapping[str, str] = os.environ) -> Iterator[Layer]:
    """User, project, run file and environment, weakest first. UserError names the file and line of what is wrong."""
    user = user_file(environ)
    if user.is_file():
        yield Layer("user", user, _read(user))
    for up in (directory, *directory.parents):
        if (up / PROJECT_FILE).is_file():
            yield Layer("project", up / PROJECT_FILE, _read(up / PROJECT_FILE))
            break
    if run_file is not None:
        yield Layer("run file", run_file, _read(run_file))
    variables = from_environment(environ)
    if variables.data:
        yield Layer("environment", None, variables)


def _read(path: Path) -> Source:
    source = read_yaml(path)
    anchor_paths(source.data, path.absolute().parent, str(path))
    profiles = source.data.get("profiles")
    for profile in profiles.values() if isinstance(profiles, dict) else ():
        if isinstance(profile, dict):
            anchor_paths(profile, path.absolute().parent, str(path))
    return source


def anchor_paths(data: dict[str, Any], folder: Path, where: str) -> None:
    """Make the paths of a file's keys relative to that file. UserError names a variable that is not set."""
    for key in _PATHS:
        value = data.get(key)
        # A bare interpreter name is looked up on PATH.
        if isinstance(value, str) and (key != "python" or "/" in value):
            data[key] = absolute(value, folder)
    if isinstance(data.get("container"), dict):
        try:
            data["container"] = expand_places(data["container"], os.environ, str(folder))
        except ValueError as error:
            raise UserError(f"container: {error} ({where})") from None


def absolute(path: str, directory: Path) -> str:
    """A path with ~ and variables expanded, relative to `directory`."""
    return os.path.normpath(directory / os.path.expanduser(os.path.expandvars(path)))


def from_environment(environ: Mapping[str, str]) -> Source:
    """SLURMKIT_PARTITION=gpu sets partition, SLURMKIT_RAY__NUM_CPUS=4 sets ray.num_cpus. Values are read as in YAML."""
    source = Source({}, {})
    sections = {*JobSpec.model_fields, *EXTRA_KEYS}
    for name, text in sorted(environ.items()):
        if not name.startswith("SLURMKIT_") or name.removeprefix("SLURMKIT_") in _NOT_KEYS:
            continue
        head, *rest = name.removeprefix("SLURMKIT_").split("__")
        # Below env, sbatch and secrets stand names that are not ours.
        key = (head.lower(), *(rest if head in ("ENV", "SECRETS") else [part.lower() for part in rest]))
        if key[0] not in sections:
            hint = nearest(key[0], sections)
            raise UserError(
                f"the environment variable {name} sets no key of a job"
                + (f"; the nearest is SLURMKIT_{hint.upper()}" if hint else "")
            )
        from slurmkit.config.yaml12 import parse_value

        try:
            value = parse_value(text)
        except ValueError:
            value = text
        put(source, key, value, f"environment: {name}")
    anchor_paths(source.data, Path.cwd(), "environment")
    return source


# Keys of a layer that settle into others.
EXTRA_KEYS = ("config", "overrides", "results_dir", "templates", "profile", "profiles")


def profile_layer(name: str, origin: str, layers: list[Layer]) -> Layer:
    """The profile of that name, wherever its parts stand. UserError lists the profiles that there are."""
    parts: list[Source] = []
    known: set[str] = set()
    for layer in layers:
        profiles = layer.source.data.get("profiles") or {}
        if not isinstance(profiles, dict) or not all(isinstance(profile, dict) for profile in profiles.values()):
            raise UserError(f"profiles: each name must hold keys of a job ({origin_of(layer.source, ('profiles',))})")
        known |= set(profiles)
        if name in profiles:
            places = layer.source.origins.items()
            inner = {key[2:]: place for key, place in places if key[:2] == ("profiles", name) and len(key) > 2}
            parts.append(Source(profiles[name], inner))
    if name not in known:
        have = f"there are {', '.join(sorted(known))}" if known else "no file defines one under profiles:"
        raise UserError(f"profile: there is no profile {name!r} ({origin}); {have}")
    return Layer("profile", None, merge(parts))
