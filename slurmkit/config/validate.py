"""From plain data to a typed model, with one message that names every problem, its place and what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from slurmkit.config.source import Key, Source
from slurmkit.errors import UserError

Model = TypeVar("Model", bound=BaseModel)
_KEY = re.compile(r"[a-z]\w*(?:\.\w+)*")


def validate(model: type[Model], source: Source) -> Model:
    """Build `model` from a merged source. UserError lists all problems, one line each."""
    try:
        return model.model_validate(source.data)
    except ValidationError as error:
        problems = [_describe(model, source, dict(problem)) for problem in error.errors(include_url=False)]
    raise UserError("\n".join(dict.fromkeys(problems)))


def _describe(model: type[BaseModel], source: Source, problem: dict[str, Any]) -> str:
    key = _written_key(source.data, problem["loc"])
    name = ".".join(key)
    origin = origin_of(source, key)
    place = f" ({origin})" if origin else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name}{place}{_nearest(name, model)}"
    if problem["type"] == "missing":
        return f"{name} is missing: it must be given"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        place = _places(source, key, message) or place
        return f"{name}: {message}{place}" if name else message + place
    if problem["type"] == "too_short":
        return f"{name}: must not be empty{place}"
    message = problem["msg"].removeprefix("Input ")
    return f"{name}: {message}, not {shown(problem['input'])}{place}"


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


def _written_key(data: Any, location: tuple[int | str, ...]) -> Key:
    """pydantic's location without the names of union members, which nobody wrote."""
    key: list[str] = []
    for depth, part in enumerate(location):
        is_last = depth == len(location) - 1
        inside: Any = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(inside, dict) and part in inside:
            data = inside[part]
        elif not (is_last and isinstance(data, dict)):
            continue
        key.append(str(part))
    return tuple(key)


def origin_of(source: Source, key: Key) -> str | None:
    """Where a key was written; for a key below the last written one, its nearest parent's place."""
    while key:
        if key in source.origins:
            return source.origins[key]
        key = key[:-1]
    return None


def _nearest(name: str, model: type[BaseModel]) -> str:
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


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a model tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for nested in _models_in(field.annotation):
            yield from known_keys(nested, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
