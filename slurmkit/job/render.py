"""From a JobSpec to one sbatch file: a pure function of the spec and the templates.

Every `{{ value }}` is shell-quoted on its way out, so a value can never become code. Text that is meant as code must
say so: `{{ line | raw }}`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import traceback
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from jinja2 import (
    ChoiceLoader,
    FileSystemLoader,
    PrefixLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
)
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from slurmkit import __version__
from slurmkit.errors import UserError
from slurmkit.job.compiled import CompiledTemplates
from slurmkit.job.spec import JobSpec

PACKAGED = Path(import_module("slurmkit.templates").__path__[0])
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")


def render(spec: JobSpec, folders: tuple[Path, ...] = ()) -> str:
    """The sbatch file. Same spec, same templates: same bytes. UserError names a broken template's file and line.

    `folders` hold a project's and a site's templates, strongest first; the packaged ones come last.
    """
    environment = environment_for(folders)
    known = runtimes(environment)
    if spec.container.runtime not in known:
        raise UserError(
            f"container.runtime: {spec.container.runtime!r} has no template container/{spec.container.runtime}.sh.j2; "
            f"there are {', '.join(known)}"
        )
    try:
        return environment.get_template("job.sbatch.j2").render(
            spec=spec,
            version=__version__,
            spec_digest=digest_of_spec(spec),
            templates_digest=digest_of_templates(folders),
        )
    except (TemplateError, TypeError) as error:
        raise UserError(f"{_place_of(error) or PACKAGED}: the template cannot be rendered: {error}") from error


@cache
def environment_for(folders: tuple[Path, ...]) -> SandboxedEnvironment:
    """Jinja2 with our rules. A name is looked up folder by folder; `slurmkit/NAME` is always the packaged file."""
    packaged = FileSystemLoader(PACKAGED)
    environment = SandboxedEnvironment(
        loader=ChoiceLoader([*map(FileSystemLoader, folders), packaged, PrefixLoader({"slurmkit": packaged})]),
        undefined=StrictUndefined,
        # Autoescape marks the output of blocks and macros, so that `finalize` can tell it from a value.
        autoescape=True,
        finalize=_quote,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        bytecode_cache=CompiledTemplates(digest_of_templates(folders), [__file__]),
    )
    environment.filters.update(raw=_raw, words=_words, directive=_directive)
    return environment


@cache
def runtimes(environment: SandboxedEnvironment) -> list[str]:
    """The container runtimes that have a template."""
    inner = [name.removeprefix("container/") for name in environment.list_templates() if name.startswith("container/")]
    return sorted(name.removesuffix(".sh.j2") for name in inner if name.endswith(".sh.j2"))


def _place_of(error: Exception) -> str | None:
    """File and line in a template: a syntax error knows them, any other has them in its traceback."""
    if isinstance(error, TemplateSyntaxError):
        return f"{error.filename}:{error.lineno}"
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
        for path in sorted(folder.rglob("*.j2")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
        digest.update(b"\0")
    return digest.hexdigest()


def _quote(value: Any) -> Any:
    if isinstance(value, Undefined):
        return str(value)  # a StrictUndefined raises here, with the name that is missing
    if hasattr(value, "__html__"):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"a template puts out {value!r}: only text and whole numbers can stand in a script")
    return Markup(shlex.quote(str(value)))


def _raw(value: object) -> Markup:
    """Text that is code already."""
    return Markup(str(value))


def _words(values: Iterable[str]) -> Markup:
    """Several values as shell words."""
    return Markup(" ".join(shlex.quote(value) for value in values))


def _directive(value: str) -> Markup:
    """A value in a `#SBATCH` line, which sbatch reads by rules of its own (src/sbatch: _get_next_opt).

    A backslash escapes the next character inside quotes too, and an unquoted # begins a comment.
    """
    if _PLAIN.fullmatch(value):
        return Markup(value)
    return Markup('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
