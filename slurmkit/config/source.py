"""YAML files as data that remembers where each key was written.

The grammar is YAML 1.2's core schema. PyYAML's default (1.1) reads `time: 4:00:00` as the number 14400, `no` as
False and `1e-3` as text; none of the three is what somebody writing a job means.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from slurmkit.errors import UserError

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """One settled input: nested plain data, and for each key path the place that set it.

    Example: data={"grpo": {"seed": 1}}, origins={("grpo",): "a.yaml:1", ("grpo", "seed"): "a.yaml:2"}.
    """

    data: dict[str, Any]
    origins: dict[Key, str]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} must be text; quote it", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice, first in line {seen[key]}",
                    problem_mark=key_node.start_mark,
                )
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$|^0x[0-9a-fA-F]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 16 if node.value.startswith("0x") else 10),
)


def parse_value(text: str) -> Any:
    """One value as a YAML file would read it: `8` is a number, `4:00:00` is text. ValueError where it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def read_yaml(path: Path) -> Source:
    """Read one YAML mapping. UserError names the file and the line of whatever is wrong with it."""
    # A copy, as the caller may change it: a sweep reads the same files for each of its jobs.
    return merge([_parse(path, read_text(path))])


def read_text(path: Path) -> str:
    """A file's text. UserError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


@lru_cache(maxsize=64)
def _parse(path: Path, text: str) -> Source:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        data = {} if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold keys and values, found {type(data).__name__}")
    return Source(data, dict(_places(node, path)) if node is not None else {})


def _places(node: yaml.Node, path: Path, prefix: Key = ()) -> Iterator[tuple[Key, str]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, str(key_node.value))
            yield key, f"{path}:{key_node.start_mark.line + 1}"
            yield from _places(value_node, path, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            key = (*prefix, str(index))
            yield key, f"{path}:{item.start_mark.line + 1}"
            yield from _places(item, path, key)


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
