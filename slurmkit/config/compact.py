"""A configuration as YAML that is complete and still short enough to be read inside a script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = 118
# Text that needs no quotes, in YAML 1.1 and 1.2, and is not one of their words.
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[a-z_/][a-z0-9_./+-]*", re.IGNORECASE)


def compact_yaml(data: Mapping[str, Any]) -> str:
    """One group per top-level key, filled like a paragraph: a group inside is only broken where a line is too short.

    The text reads back as `data`, in YAML 1.1 as in 1.2. Example: {"a": {"b": 1, "c": "x y"}} is `a: {b: 1, c: "x y"}`.
    """
    groups = ("\n".join(_filled(f"{_flow(key)}: ", value, "  ")) for key, value in data.items())
    return "".join(f"{group.removesuffix(',')}\n" for group in groups)


def _filled(start: str, value: Any, indent: str) -> Iterator[str]:
    """The lines of one entry; the last ends in a comma, each other in one of its group's."""
    whole = f"{start}{_flow(value)},"
    if len(whole) <= _WIDTH or not isinstance(value, dict) or not value:
        yield whole
        return
    line = f"{start}{{"
    for key, inner in value.items():
        piece = f"{_flow(key)}: {_flow(inner)},"
        if len(line) + 1 + len(piece) > _WIDTH:
            yield line
            *lines, line = _filled(f"{indent}{_flow(key)}: ", inner, indent + "  ")
            yield from lines
        else:
            line += piece if line.endswith("{") else f" {piece}"
    yield f"{line[:-1]}}},"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else _quoted(value)
    if isinstance(value, float):
        text = repr(value).replace("inf", ".inf").replace("nan", ".nan")
        return text if "." in text else text.replace("e", ".0e")
    return "null" if value is None else str(value).lower()


def _quoted(text: str) -> str:
    """In double quotes, because a shell would have to close and open single ones again."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'
