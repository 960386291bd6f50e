"""Plain data that remembers where each of its keys was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.errors import UserError

Key = tuple[str, ...]


class Source(NamedTuple):
    """One settled input: nested plain data, and for each key path the place that set it.

    Example: data={"grpo": {"seed": 1}}, origins={("grpo",): "a.yaml:1", ("grpo", "seed"): "a.yaml:2"}.
    """

    data: dict[str, Any]
    origins: dict[Key, str]


def read_yaml(path: Path) -> Source:
    """Read one YAML mapping. UserError names the file and the line of whatever is wrong with it."""
    return parse_yaml(path, read_text(path))


def parse_yaml(path: Path, text: str) -> Source:
    """`read_yaml` for what a file was found to hold."""
    from slurmkit.config.yaml12 import parse  # not every command has a file, and PyYAML takes 20 ms to import

    # A copy, as the caller may change it: a sweep reads the same files for each of its jobs.
    return merge([parse(path, text)])


def read_text(path: Path) -> str:
    """A file's text. UserError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key that holds no further keys, and its value."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def merge(sources: list[Source]) -> Source:
    """Lay sources over each other, weakest first: mappings merge key by key, anything else is replaced."""
    data: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    for source in sources:
        _merge_into(data, source.data)
        origins.update(source.origins)
    return Source(data, origins)


def _merge_into(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict):
            target = below.get(key)
            if not isinstance(target, dict):
                target = below[key] = {}
            _merge_into(target, value)
        else:
            below[key] = value


def put(source: Source, key: Key, value: Any, origin: str) -> None:
    """Set one key. What stood in its way is replaced, and what stood below it is forgotten, origins included."""
    parent = source.data
    for depth, part in enumerate(key[:-1], 1):
        if not isinstance(parent.get(part), dict):
            parent[part] = {}
            source.origins[key[:depth]] = origin
        parent = parent[part]
    parent[key[-1]] = value
    for inner in [known for known in source.origins if known[: len(key)] == key]:
        del source.origins[inner]
    source.origins[key] = origin
