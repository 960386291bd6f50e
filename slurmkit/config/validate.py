"""From plain data to a typed model, with one message that names every problem, its place and what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, get_args

from slurmkit.config.nemo_rl import advice_on
from slurmkit.config.section import Problem, Section, ValidationError
from slurmkit.config.source import Key, Source
from slurmkit.errors import UserError

Model = TypeVar("Model", bound=Section)
_KEY = re.compile(r"[a-z]\w*(?:\.\w+)*")


def validate(model: type[Model], source: Source) -> Model:
    """Build `model` from a merged source. UserError lists all problems, one line each."""
    try:
        return model.model_validate(source.data)
    except ValidationError as error:
        problems = [_describe(model, source, problem) for problem in error.problems]
    raise UserError("\n".join(dict.fromkeys(problems)))


def _describe(model: type[Section], source: Source, problem: Problem) -> str:
    key = tuple(map(str, problem.location))
    name = ".".join(key)
    origin = origin_of(source, key)
    place = f" ({origin})" if origin else ""
    if problem.kind == "unknown":
        advice = advice_on(name, problem.input)
        return f"unknown key {name}{place}" + (f": {advice}" if advice else _nearest(name, model))
    if problem.kind == "missing":
        return f"{name} is missing: it must be given"
    if problem.kind == "value":
        place = _places(source, key, problem.message) or place
        return f"{name}: {problem.message}{place}" if name else problem.message + place
    if problem.kind == "empty":
        return f"{name}: must not be empty{place}"
    return f"{name}: {problem.message}, not {shown(problem.input)}{place}"


def _places(source: Source, section: Key, message: str) -> str:
    """Where the keys were written that a message about several of them names, as `nodes (8)` or with its section."""
    found: dict[str, str] = {}
    for match in _KEY.finditer(message):
        word = match[0]
        if "." in word or "_" in word or message.startswith(" (", match.end()):
            written = tuple(word.split("."))
            origin = source.origins.get((*section, *written)) or source.origins.get(written)
            if origin:
                found[word] = origin
    if len(found) == 1:
        return f" ({next(iter(found.values()))})"
    return f" ({'; '.join(f'{word}: {origin}' for word, origin in found.items())})" if found else ""


def shown(value: Any) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def origin_of(source: Source, key: Key) -> str | None:
    """Where a key was written; for a key below the last written one, its nearest parent's place."""
    while key:
        if key in source.origins:
            return source.origins[key]
        key = key[:-1]
    return None


def _nearest(name: str, model: type[Section]) -> str:
    found = nearest(name, [key for key in known_keys(model) if not name.startswith(f"{key}.")])
    return f"; the nearest known key is {found}" if found else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known key that was probably meant: almost the same, of the same last part, or at least alike."""
    import difflib

    known = list(known)
    last = name.rpartition(".")[2]
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    found = found or [key for key in known if key.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return found[0] if found else None


def known_keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a model tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for nested in _models_in(field.annotation):
            yield from known_keys(nested, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
