"""The record beside a rendered file: what it was made from, and whether that still makes the same bytes.

jobs/x.sbatch has jobs/x.json. Paths inside the repository are relative to that file, so a checkout elsewhere can check
them; all others are absolute. But for what git says nothing in it changes between two renders: no clock, no host.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slurmkit import __version__
from slurmkit.config.section import Section
from slurmkit.config.source import Source
from slurmkit.config.validate import validate
from slurmkit.errors import UserError
from slurmkit.job.provenance import Repository, checkout_of, repository_of
from slurmkit.job.render import PACKAGED, digest_of_spec, digest_of_templates
from slurmkit.job.settle import Settled
from slurmkit.job.spec import JobSpec

_HEADER = re.compile(
    r"#!.*\n# Rendered by slurmkit (?P<version>\S+)\. .*\n"
    r"# spec +sha256:(?P<spec>[0-9a-f]{64})\n# templates +sha256:(?P<templates>[0-9a-f]{64})\n"
)
_ORIGIN = re.compile(r"(?P<path>.+?)(?P<line>:\d+)?")
HEAD_BYTES = 1000

Names = tuple[str, ...]


class Commit(Section):
    """A repository's state."""

    commit: str | None
    """The last commit, or null before the first."""
    changed: dict[str, str]
    """Tracked files that differ from it, and sources that it does not hold, in the words of `git status`."""


class Sidecar(Section):
    """The whole of jobs/x.json."""

    slurmkit: str
    """The version that rendered."""
    file: str
    """The rendered file's name, beside this one."""
    sha256: str
    """Of the rendered file's bytes."""
    command: str
    """What renders it again …"""
    directory: str
    """… in this folder."""
    spec_sha256: str
    """Of `spec`, as in the file's header."""
    templates_sha256: str
    """Of all templates together, as in the file's header."""
    templates: Names
    """Folders of templates before the packaged ones, strongest first."""
    sources: dict[str, str]
    """Every file that was read to settle the job, with its sha256."""
    site: str | None = None
    """The site's file, which is one of the sources; null if none was in force."""
    environment: Names
    """Names of the variables that the job sets."""
    secrets: Names
    """Names of the variables that are read when it is submitted."""
    git: Commit | None
    """The repository of the folder in which it was rendered."""
    slurmkit_git: Commit | None
    """The repository of slurmkit itself, where it ran from a checkout."""
    spec: dict[str, Any]
    """The settled job."""
    origins: dict[str, str]
    """Where each of its keys was set; one that is not here has slurmkit's default."""
    config_origins: dict[str, str]
    """The same for the training configuration."""


@dataclass(frozen=True)
class RenderedFile:
    """A rendered file and the record beside it, as they are on disk."""

    path: Path
    data: bytes
    sidecar: Sidecar

    @cached_property
    def spec(self) -> JobSpec:
        """The job. UserError where this version of slurmkit has no such job any more."""
        try:
            return validate(JobSpec, Source(self.sidecar.spec, {}))
        except UserError as error:
            raise UserError(
                f"{sidecar_of(self.path)}: slurmkit {self.sidecar.slurmkit} wrote it, and {__version__} cannot read "
                f"its spec: {error}\nrender it again: {self.again}"
            ) from None

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of templates."""
        return tuple(self.absolute(folder) for folder in self.sidecar.templates)

    @property
    def again(self) -> str:
        """What to type to render it again, from where the user is."""
        folder = os.path.relpath(self.absolute(self.sidecar.directory))
        return self.sidecar.command if folder == "." else f"cd {shlex.quote(folder)} && {self.sidecar.command}"

    def absolute(self, path: str) -> Path:
        """Where a path of the record is on this machine."""
        return Path(os.path.normpath(self.path.parent.resolve() / path))

    def from_here(self, origin: str) -> str:
        """Return an origin with the path of its file relative to the working directory."""
        found = _ORIGIN.fullmatch(origin)
        if found is None or os.path.isabs(found["path"]) or found["path"] not in self.sidecar.sources:
            return origin
        return os.path.relpath(self.absolute(found["path"])) + (found["line"] or "")

    def edits(self) -> Iterator[str]:
        """What was changed by hand since it was rendered."""
        if hashlib.sha256(self.data).hexdigest() != self.sidecar.sha256:
            yield f"{self.path} was edited since it was rendered"
        header = header_of(self.data)
        if digest_of_spec(self.spec) != self.sidecar.spec_sha256 or (header and header[1] != self.sidecar.spec_sha256):
            yield f"the spec in {sidecar_of(self.path)} is not the one that it was rendered from"

    def settled(self) -> Settled:
        """The job as it was settled when it was rendered."""
        train = None
        if self.spec.config is not None:
            from slurmkit.config.schema import TrainConfig
            from slurmkit.config.yaml12 import parse_value

            train = validate(TrainConfig, Source(parse_value(self.spec.config), {}))
        origins, config_origins = (
            {key: self.from_here(origin) for key, origin in recorded.items()}
            for recorded in (self.sidecar.origins, self.sidecar.config_origins)
        )
        origins = defaultdict(lambda: "default", origins)
        return Settled(self.spec, origins, self.folders, train=train, config_origins=config_origins)


def sidecar_of(path: Path) -> Path:
    """The record beside a rendered file."""
    return path.with_suffix(".json")


def header_of(data: bytes) -> tuple[str, str, str] | None:
    """Version, spec digest and templates digest in a rendered file's first lines; None where it is not one."""
    found = _HEADER.match(data[:HEAD_BYTES].decode(errors="replace"))
    return (found["version"], found["spec"], found["templates"]) if found else None


def record(settled: Settled, script: str, out: Path, directory: Path, command: str) -> str:
    """The text of the record for `script`, written to `out` by `command` in `directory`."""
    out = Path(os.path.normpath(directory / out))
    out = out.parent.resolve() / out.name
    repository = repository_of(directory)
    root = repository.root if repository else directory
    portable = out.is_relative_to(root)

    def shown(path: Path) -> str:
        return os.path.relpath(path, out.parent) if portable and path.is_relative_to(root) else str(path)

    def place(origin: str) -> str:
        found = _ORIGIN.fullmatch(origin)
        path = Path(os.path.normpath(directory / found["path"])) if found else None
        return shown(path) + (found["line"] or "") if found and path in sources else origin

    sources = [Path(os.path.normpath(path)) for path in settled.sources]
    own = checkout_of(PACKAGED / "job.sbatch.j2")
    sidecar = Sidecar(
        slurmkit=__version__,
        file=out.name,
        sha256=hashlib.sha256(script.encode()).hexdigest(),
        command=command,
        directory=shown(directory),
        spec_sha256=digest_of_spec(settled.spec),
        templates_sha256=digest_of_templates(settled.templates),
        templates=tuple(shown(path) for path in settled.templates),
        sources={shown(path): digest_of(path) for path in sources},
        site=None if settled.site is None else shown(Path(os.path.normpath(settled.site))),
        environment=tuple(sorted(settled.spec.env)),
        secrets=tuple(sorted(getattr(settled.spec, "secrets", ()))),
        git=_state(repository, sources, {out, sidecar_of(out)}) if repository else None,
        slurmkit_git=_state(own, (), set()) if own else None,
        spec=settled.spec.model_dump(mode="json"),
        origins={key: place(origin) for key, origin in settled.origins.items() if origin != "default"},
        config_origins={key: place(origin) for key, origin in settled.config_origins.items()},
    )
    return json.dumps(sidecar.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_rendered(path: Path) -> RenderedFile:
    """Read a rendered file and its record. UserError says what is wrong with either, and what to do."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if header_of(data) is None:
        raise UserError(f"{path} does not begin as a file that slurmkit rendered")
    beside = sidecar_of(path)
    again = f"render it with its record: slurmkit render … --out {shlex.quote(str(path))}"
    try:
        content = json.loads(beside.read_bytes())
        sidecar = validate(Sidecar, Source(content, {}))
    except FileNotFoundError:
        raise UserError(
            f"{path} has no {beside.name} beside it, which says what it was rendered from; {again}"
        ) from None
    except (OSError, ValueError, UserError) as error:
        problem = str(error).replace("\n", "; ")
        raise UserError(f"{beside}: is not the record of a rendered file: {problem}; {again}") from None
    if sidecar.file != path.name:
        raise UserError(f"{beside} is the record of {sidecar.file}, not of {path.name}; {again}")
    return RenderedFile(path, data, sidecar)


def command_line(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """What was typed, with the variables that set keys of the job before it."""
    named = [f"{name}={shlex.quote(value)}" for name, value in sorted(environ.items()) if _sets_a_key(name)]
    return " ".join([*named, shlex.join(["slurmkit", *arguments])])


def _sets_a_key(name: str) -> bool:
    return name.startswith("SLURMKIT_") and not name.startswith(("SLURMKIT_TEST_", "SLURMKIT_DEVCLUSTER"))


def _state(repository: Repository, sources: Iterable[Path], without: set[Path]) -> Commit:
    root = repository.root
    inside = [path for path in sources if path.is_relative_to(root)]
    changes = repository.changes() | (repository.changes(*inside) if inside else {})
    changed = {str(path.relative_to(root)): word for path, word in changes.items() if path not in without}
    return Commit(commit=repository.commit, changed=dict(sorted(changed.items())))


def digest_of(path: Path) -> str:
    """sha256 of a file; nothing where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
