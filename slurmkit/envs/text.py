"""Checks that text can be encoded as UTF-8, as tokenizers require."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_text(text: str) -> bool:
    """Return whether the text holds no half of a surrogate pair."""
    return text.isascii() or _half_pair(text) is None


def refuse_half_pairs(value: Any, key: str) -> None:
    """Raise ValueError if a text inside `value` holds half of a surrogate pair. The message names its dotted key.

    A JSON text may escape one half alone (RFC 8259, section 8.2). Lists and objects are searched, their keys included.
    """
    pending = [(key, value)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, str):
            if not value.isascii() and (place := _half_pair(value)) is not None:
                raise ValueError(
                    f"the key {key!r} holds half of a surrogate pair, which is no character: {value[place]!a} at "
                    f"position {place}"
                )
        elif isinstance(value, Mapping):
            pending += [(f"{key}.{name}", part) for name, text in value.items() for part in (text, name)]
        elif isinstance(value, list | tuple):
            pending += [(f"{key}.{index}", part) for index, part in enumerate(value)]


def _half_pair(text: str) -> int | None:
    """Return the position of the first half of a surrogate pair, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
