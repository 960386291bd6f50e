"""What a job's script is in Slurm, on disk and in git, and which of them agree."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurmkit.errors import Failure, UserError
from slurmkit.job.audit import header_of, read_rendered, sidecar_of
from slurmkit.job.provenance import blob, repository_of
from slurmkit.job.render import digest_of_spec
from slurmkit.run.committed import few
from slurmkit.run.directory import RunDirectory
from slurmkit.slurm.client import SlurmClient

_RUN_DIR = re.compile(r"^(?:sk_)?run_dir=(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Place:
    """One place that should hold what Slurm stores. Example: Place("/r/job.sbatch", "differs", b"#!/bin/bash…")."""

    name: str
    verdict: str
    """`same`, `differs` or `missing`."""
    text: bytes | None = None
    """What is there, where it can be shown as a difference."""


def stored_script(job_id: str, client: SlurmClient) -> bytes:
    """The script of a job of slurmkit's, as Slurm stores it. UserError where there is none to compare with."""
    try:
        script = client.script_of(job_id)
    except Failure as error:
        raise UserError(f"job {job_id}: nothing to compare, Slurm gives out no script of it: {error}") from None
    if not script:
        raise UserError(f"job {job_id}: nothing to compare, Slurm knows no such job any more, or keeps no script of it")
    if header_of(script) is None:
        raise UserError(f"job {job_id} is not slurmkit's: its script does not begin as one that slurmkit rendered")
    return script


def run_dir_in(script: bytes) -> Path | None:
    """The run directory that a rendered script names."""
    found = _RUN_DIR.search(script.decode(errors="replace"))
    return Path(shlex.split(found[1])[0]) if found and header_of(script) else None


def places(job_id: str, script: bytes) -> Iterator[Place]:
    """Each place that holds the job's script, compared with `script`, which Slurm stores."""
    run_dir = run_dir_in(script)
    if run_dir is None:
        raise UserError(f"job {job_id}: its script names no run directory")
    directory = RunDirectory(run_dir)
    attempts = [one for one in directory.attempts if "job_id" in one]
    attempt = _attempt_of(job_id, attempts)
    later = f" (written again for job {attempts[-1]['job_id']})" if attempt and attempt is not attempts[-1] else ""
    yield _compare(f"{run_dir / 'job.sbatch'}{later}", _read(run_dir / "job.sbatch"), script)
    header = header_of(script)
    assert header is not None
    recorded = attempt.get("spec", "")
    yield _digests(f"{run_dir / 'run.json'}: digest of the spec", recorded.removeprefix("sha256:"), header[1])
    if "file" not in attempt:
        return
    file = Path(attempt["file"])
    yield _compare(str(file), _read(file), script)
    yield _digests(f"{sidecar_of(file)}: digest of the spec", _spec_beside(file), header[1])
    if "git" in attempt:
        commit = attempt["git"]["commit"]
        if tree := attempt["git"].get("tree"):
            yield Place(f"work tree when it was submitted, against {commit or 'no commit'}: {few(tree)}", "differs")
        try:
            repository = repository_of(file.parent)
        except Failure as error:
            yield Place(f"git: {error}", "missing")
            return
        for name in filter(None, (commit, "HEAD")):
            of = " (when it was submitted)" if name == commit else ""
            inside = os.path.relpath(file, repository.root) if repository else file.name
            if file.is_symlink():
                yield Place(f"git {name[:12]}:{inside}{of}: a symbolic link, not the script", "differs")
                continue
            yield _compare(f"git {name[:12]}:{inside}{of}", blob(file, name) if repository else None, script)


def _attempt_of(job_id: str, attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the submission that the job comes from: its own, else the last one before a follow-up."""
    number = int(re.split(r"\D", job_id, maxsplit=1)[0])
    before = [one for one in attempts if int(one["job_id"]) <= number]
    return max(before, key=lambda one: int(one["job_id"]), default={})


def _compare(name: str, text: bytes | None, script: bytes) -> Place:
    return Place(name, "missing" if text is None else "same" if text == script else "differs", text)


def _digests(name: str, have: str, want: str) -> Place:
    return Place(name, "missing" if not have else "same" if have == want else "differs")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _spec_beside(file: Path) -> str:
    """The digest of the spec in the record beside a rendered file, computed anew."""
    try:
        return digest_of_spec(read_rendered(file).spec)
    except UserError:
        return ""
