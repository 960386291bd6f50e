"""Whether committed files are still what rendering makes of their sources."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slurmkit import __version__
from slurmkit.job.audit import HEAD_BYTES, RenderedFile, digest_of, header_of, sidecar_of
from slurmkit.job.render import digest_of_templates
from slurmkit.job.syntax import checked_script


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` found out about one file."""

    problems: tuple[str, ...]
    """Why it no longer is what rendering makes of its sources."""
    notices: tuple[str, ...]
    """What this machine cannot know."""
    diff: str
    """From the file to what would be rendered today."""


def check(rendered: RenderedFile) -> Checked:
    """Render again from the recorded spec with the templates of today, and compare."""
    sidecar = rendered.sidecar
    problems = list(rendered.edits())
    version, _, templates = header_of(rendered.data) or ("", "", "")
    if __version__ not in (version, sidecar.slurmkit):
        problems.append(f"slurmkit {version} rendered it, this is {__version__}")
    if digest_of_templates(rendered.folders) != templates:
        problems.append("the templates have changed since")
    today = checked_script(rendered.spec, rendered.folders)
    diff = diff_of(rendered.data, today.encode(), str(rendered.path), f"{rendered.path} rendered today")
    if diff and not problems:
        problems.append("it is rendered to other bytes today")
    notices: list[str] = []
    for path, digest in sidecar.sources.items():
        now = digest_of(rendered.absolute(path))
        if now != digest:
            where = os.path.relpath(rendered.absolute(path)) if not os.path.isabs(path) else path
            what = f"{where} {'has changed since' if now else 'is not there any more'}"
            (notices if os.path.isabs(path) else problems).append(what)
    return Checked(tuple(problems), tuple(notices), diff)


def diff_of(before: bytes, after: bytes, name_before: str, name_after: str) -> str:
    """A unified diff, or nothing where both are the same bytes."""
    if before == after:
        return ""
    old, new = (data.decode(errors="backslashreplace").splitlines(keepends=True) for data in (before, after))
    lines = difflib.unified_diff(old, new, name_before, name_after)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def rendered_below(folder: Path) -> Iterator[Path]:
    """Yield every *.sbatch that slurmkit rendered, in order; those behind symbolic links to folders come last.

    Does not enter run directories, which hold a run.json, nor a link to a folder that contains `folder`.
    """
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        for parent, folders, files in os.walk(waiting.pop(0)):
            real = os.path.realpath(parent)
            if "run.json" in files or real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links = [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
            waiting += [link for link in links if not folder.resolve().is_relative_to(link.resolve())]
            yield from _rendered_among(Path(parent, name) for name in sorted(files))


def _rendered_among(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.suffix == ".sbatch" and (sidecar_of(path).exists() or _is_ours(path)))


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return header_of(file.read(HEAD_BYTES)) is not None
    except OSError:
        return False
