"""The reference pages of docs/, made from the keys themselves: `python -m slurmkit.job.reference docs`."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from slurmkit.config.schema import TrainConfig
from slurmkit.config.section import Field, Key, Section
from slurmkit.job.spec import JobSpec

_MADE = "<!-- Made by `python -m slurmkit.job.reference docs`, from the docstrings of the keys. Change those. -->\n"
_TRAINING = """\
# Configuration reference

The keys of a training configuration: a YAML file (`--config FILE`), with `defaults: OTHER.yaml` for the file that it
builds on, and `key=value` on the command line over both. `???` as a value leaves a key open, to be given there.
`slurmkit config --config FILE` prints what a run would have, each value with the file and line that it comes from. A
key that is not here is an error, which names the nearest one.

What a job asks Slurm for has a page of its own: [Keys of a job](job-keys.md).
"""
_JOB = """\
# Keys of a job

What a job is, in a run file (`slurmkit submit job.yaml`), a project's `slurmkit.yaml`, the user's or the site's file:
[For administrators](administrators.md) has the order in which these count. On the command line every key is
`--set KEY=VALUE` (`--set ray.num_cpus=4`), the common ones have options of their own, and in the environment it is
`SLURMKIT_KEY` (`SLURMKIT_RAY__NUM_CPUS=4`).

Some keys say where a job comes from, and are no part of it: `config` (in a file, the path of a training
configuration), `overrides` (a list of `key=value` for it), `results_dir` (run directories are made in it; `./results`),
`profile`, `profiles`, and `templates` (a folder: [Templates](templates.md)). `config` and `command` exclude each other.
`name` is by default the name of the file that says what runs, `workdir` the folder that you submit from, `python` the
interpreter that submits (`python3` in a container), and `run_dir` is `results_dir` and `name`.
"""
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything", NoneType: "null"}


def pages() -> dict[str, str]:
    """Name and text of each page."""
    return {
        "configuration.md": _MADE + _TRAINING + "".join(_tables("", TrainConfig)),
        "job-keys.md": _MADE + _JOB + "".join(_tables("", JobSpec)),
    }


def _tables(prefix: str, section: type[Section]) -> Iterator[str]:
    """The table of a section's own keys, then those of the sections in it."""
    rows, inner = [], []
    for name, key in section.model_fields.items():
        path = f"{prefix}{name}.NAME" if get_origin(_plain(key.annotation)) is dict else f"{prefix}{name}"
        below = _sections(key.annotation)[:1]
        if below and (isinstance(key.default, Section) or key.is_required):
            must = " Must be given." if key.is_required else ""
            inner.append((path, below[0], f"\n{_meaning(key)}{must}\n"))
            continue
        inner += [(path, each, "") for each in below]
        shown = "must be given" if key.is_required else f"`{json.dumps(key.default, ensure_ascii=False)}`"
        rows.append(f"| `{name}` | {_cell(_kind(key.annotation))} | {_cell(shown)} | {_cell(_meaning(key))} |\n")
    if rows:
        yield "\n| key | type | default | meaning |\n|---|---|---|---|\n"
        yield from rows
    for path, each, meaning in inner:
        yield f"\n## {path}\n{meaning}"
        yield from _tables(f"{path}.", each)


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _sections(kind: Any) -> list[type[Section]]:
    """The sections that a value of a type may be. One that is written as text is none."""
    if isinstance(kind, type) and issubclass(kind, Section):
        dump = kind._rules["dump"]
        return [] if dump and getattr(kind, dump[-1]).__annotations__["return"] == "str" else [kind]
    return [found for each in get_args(kind) for found in _sections(each)]


def _kind(kind: Any) -> str:
    """A type in words, with its bounds."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [words for each in arguments[1:] if isinstance(each, Field) for words in _bounds(each)]
        return " ".join(filter(None, (_kind(arguments[0]), " and ".join(bounds))))
    if origin in (Union, UnionType):
        return ", or ".join(map(_kind, arguments))
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is tuple:
        if arguments[-1] is ...:
            return f"list of {_kind(arguments[0])}"
        return f"list of {len(arguments)}: {', '.join(map(_kind, arguments))}"
    if origin is dict:
        return f"mapping to {_kind(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "section" if _sections(kind) else "text"
    return _WORDS[kind]


def _bounds(field: Field) -> Iterator[str]:
    for sign, bound in ((">", field.gt), ("≥", field.ge), ("<", field.lt), ("≤", field.le)):
        if bound is not None:
            yield f"{sign} {bound:,}"
    if field.min_length:
        yield f"with at least {field.min_length}"


def _meaning(key: Key) -> str:
    found = [texts[key.name] for each in key.section.__mro__ if key.name in (texts := _docstrings(each))]
    assert found, f"{key.section.__name__}.{key.name} has no docstring"
    return found[0]


@cache
def _docstrings(section: type) -> dict[str, str]:
    """The text below each key of a class, in one line."""
    if section in (Section, object):
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        key.target.id: " ".join(inspect.cleandoc(text.value.value).split())
        for key, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(key, ast.AnnAssign)
        and isinstance(key.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for page, text in pages().items():
        Path(sys.argv[1], page).write_text(text, encoding="utf-8")
