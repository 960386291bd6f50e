"""A training configuration from its YAML file, the files it builds on, and overrides on the command line.

Composition follows NeMo RL: `defaults:` names one parent file or a list of them, relative to the file, merged depth
first. Overrides are written in Hydra's grammar. As the schema knows every key, `key=value`, `+key=value` and
`++key=value` all set a key and none can create an unknown one; `~key` puts the default back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from slurmkit.config.schema import TrainConfig
from slurmkit.config.source import Key, Source, merge, put, read_yaml
from slurmkit.config.validate import validate
from slurmkit.errors import UserError

_WORD = re.compile(r"[\w.-]+")
# An interpolation of a relative key, or of one that is only known when another interpolation is.
_COMPUTED = re.compile(r"[{:,]\s*\.|[.{]\$\{|\}[\w.[]|\[")


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read, compose, override, resolve interpolations and validate. UserError names key, value and place."""
    return validate(TrainConfig, read_config(path, overrides))


def read_config(path: Path, overrides: Sequence[str] = ()) -> Source:
    """All of `load_config` but the validation: what the files and overrides say, and where each key was set."""
    source = _compose(path.absolute(), ())
    for override in overrides:
        _apply(source, override)
    return _resolve(source, path)


def _compose(path: Path, children: tuple[Path, ...]) -> Source:
    if path in children:
        raise UserError(f"{path}: `defaults` leads back to the file itself: {' -> '.join(map(str, children))}")
    source = read_yaml(path)
    parents = source.data.pop("defaults", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(
            f"{source.origins[('defaults',)]}: `defaults` must be a file name or a list of them, not {parents!r}"
        )
    return merge([*(_compose((path.parent / parent).resolve(), (*children, path)) for parent in parents), source])


def _apply(source: Source, text: str) -> None:
    # Hydra takes 0.2 s to import, and most commands carry no override.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the override {text!r} is not Hydra's key=value: {reason}; quote values that hold spaces, commas or "
            "brackets: key='\"a, b\"'"
        ) from None
    key: Key = tuple(override.key_or_group.split("."))
    if override.is_sweep_override():
        raise UserError(f"the override {text!r} is a sweep over several values; give one value, or a list: [1,2]")
    if not override.is_delete():
        put(source, key, override.value(), f"command line: {text}")
        return
    parent: Any = source.data
    for part in key[:-1]:
        parent = parent.get(part) if isinstance(parent, dict) else None
    if not isinstance(parent, dict) or key[-1] not in parent:
        raise UserError(f"the override {text!r} removes a key that the configuration does not set")
    del parent[key[-1]]
    for inner in [known for known in source.origins if known[: len(key)] == key]:
        del source.origins[inner]


def _resolve(source: Source, path: Path) -> Source:
    texts = dict(_texts(source.data))
    unset = sorted(key for key, text in texts.items() if text == "???")
    if unset:
        raise UserError(
            "\n".join(
                f"{'.'.join(key)} must be given ({source.origins.get(key, path)} leaves it open with ???): add "
                f"{'.'.join(key)}=VALUE"
                for key in unset
            )
        )
    open_texts = {key: text for key, text in texts.items() if "${" in text}
    if not open_texts:
        return source
    words = {tuple(word.split(".")) for text in open_texts.values() for word in _WORD.findall(text)}
    # OmegaConf takes 0.1 ms per key, so it is given no more than its texts speak of.
    is_clear = not any(_COMPUTED.search(text) for text in open_texts.values())
    part = _part(source.data, {*open_texts, *words}) if is_clear else source.data
    resolved = _resolved(path, path.absolute().parent, json.dumps(part), tuple(os.environ.items()))
    return merge([source, Source(resolved, {})])


@lru_cache(maxsize=8)
def _resolved(path: Path, folder: Path, part: str, _environment: object) -> dict[str, Any]:
    """All that a result depends on are arguments, so that the jobs of a sweep can share one."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # The resolvers of NeMo RL's configurations, and the folder of the configuration itself.
    resolvers: dict[str, Callable[..., Any]] = {
        "add": lambda *terms: sum(terms),
        "mul": lambda left, right: left * right,
        "div": lambda left, right: left / right,
        "max": lambda *terms: max(terms),
        "config_dir": lambda: str(folder),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(json.loads(part)), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]} (key {error.full_key or '?'})") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _texts(data: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _texts(value, (*key, str(name)))


def _part(data: dict[str, Any], wanted: set[Key], key: Key = ()) -> dict[str, Any]:
    """The entries of `data` that are wanted, that lie below a wanted one, or that lead to one."""
    part = {}
    for name, value in data.items():
        inner = (*key, name)
        if any(inner[: len(each)] == each for each in wanted):
            part[name] = value
        elif any(each[: len(inner)] == inner for each in wanted):
            part[name] = _part(value, wanted, inner) if isinstance(value, dict) else value
    return part
