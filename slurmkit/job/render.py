"""From a JobSpec to one sbatch file: a pure function of the spec and the templates.

Every `{{ value }}` is shell-quoted on its way out, so a value can never become code. Text that is meant as code must
say so: `{{ line | raw }}`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

from jinja2 import ChoiceLoader, PrefixLoader, TemplateSyntaxError
from markupsafe import Markup

from slurmkit import __version__
from slurmkit.errors import UserError
from slurmkit.job import sandbox
from slurmkit.job.compiled import CompiledTemplates
from slurmkit.job.keeper_file import digest_of_keeper, name_of_keeper
from slurmkit.job.sandbox import Folder, Sandbox, bounded, quote
from slurmkit.job.spec import JobSpec
from slurmkit.job.values import shell_word

PACKAGED = Path(import_module("slurmkit.templates").__path__[0])
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")


def render(spec: JobSpec, folders: tuple[Path, ...] = (), kind: Callable[..., Sandbox] = Sandbox) -> str:
    """The sbatch file. Same spec, same templates: same bytes. UserError names a broken template's file and line.

    `folders` hold a project's and a site's templates, strongest first; the packaged ones come last.
    """
    environment = environment_for(folders, kind)
    known = runtimes(environment)
    if spec.container.runtime not in known:
        raise UserError(
            f"container.runtime: {spec.container.runtime!r} has no template container/{spec.container.runtime}.sh.j2; "
            f"there are {', '.join(known)}"
        )
    with bounded():
        try:
            return environment.get_template("job.sbatch.j2").render(
                spec=spec,
                keeper=f"{spec.run_dir}/{name_of_keeper()}",
                keeper_sha256=digest_of_keeper(),
                version=__version__,
                spec_digest=digest_of_spec(spec),
                templates_digest=digest_of_templates(folders),
            )
        except Exception as error:
            place = place_of(error)
            if place is None:
                raise
            said = str(error) or type(error).__name__
            raise UserError(f"{place}: the template cannot be rendered: {said}") from error


@cache
def environment_for(folders: tuple[Path, ...], kind: Callable[..., Sandbox] = Sandbox) -> Sandbox:
    """Jinja2 with our rules. A name is looked up folder by folder, strongest first, and then among the packaged files.

    `slurmkit/NAME` is always the packaged file, `site/NAME` the one below the strongest folder's.
    """
    packaged = Folder(PACKAGED)
    chain = [*map(Folder, folders), packaged]
    prefixes = PrefixLoader({"slurmkit": packaged, "site": ChoiceLoader(chain[1:] or chain)})
    filters = {"raw": _raw, "words": _words, "directive": _directive}
    compiled = CompiledTemplates(digest_of_templates(folders), [__file__, sandbox.__file__])
    return kind(ChoiceLoader([*chain, prefixes]), filters, compiled if kind is Sandbox else None)


@cache
def runtimes(environment: Sandbox) -> list[str]:
    """The container runtimes that have a template."""
    inner = [name.removeprefix("container/") for name in environment.list_templates() if name.startswith("container/")]
    return sorted(name.removesuffix(".sh.j2") for name in inner if name.endswith(".sh.j2"))


def place_of(error: Exception) -> str | None:
    """File and line in a template: a syntax error knows them, any other has them in its traceback."""
    if isinstance(error, TemplateSyntaxError):
        return f"{error.filename}:{error.lineno}"
    import traceback

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".j2")]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def digest_of_spec(spec: JobSpec) -> str:
    """sha256 over the spec as canonical JSON."""
    canonical = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@cache
def digest_of_templates(folders: tuple[Path, ...]) -> str:
    """sha256 over all templates that a job could be rendered from, wherever their folders lie."""
    digest = hashlib.sha256()
    for folder in (*folders, PACKAGED):
        for name in names_in(folder):
            try:
                digest.update(f"{name}\0".encode() + (folder / name).read_bytes() + b"\0")
            except OSError as error:
                raise UserError(f"{folder / name}: the template cannot be read: {error.strerror}") from None
        digest.update(b"\0")
    return digest.hexdigest()


def names_in(folder: Path) -> list[str]:
    """The names of a folder's templates, in order."""
    found = glob.iglob("**/*.j2", root_dir=folder, recursive=True, include_hidden=True)
    return sorted(name for name in found if (folder / name).is_file())


def _raw(value: str | int) -> Markup:
    """Text that is code already."""
    quote(value)
    return Markup(str(value))


def _words(values: Iterable[str]) -> Markup:
    """Several values as shell words."""
    return Markup(" ".join(map(shell_word, values)))


def _directive(value: str) -> Markup:
    """A value in a `#SBATCH` line, which sbatch reads by rules of its own (src/sbatch: _get_next_opt).

    A backslash escapes the next character inside quotes too, and an unquoted # begins a comment.
    """
    if _PLAIN.fullmatch(value):
        return Markup(value)
    return Markup('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
