r"""The answer at the end of a text: after `####`, in `\boxed{}`, or on a line `Answer: …`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

MAX_LENGTH = 1000
"""Characters of an answer, at most: none is longer, and comparing one would take ages."""

_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
# As DAPO's prompt asks for it; models also write "**Final Answer:** 34".
_LINE = re.compile(r"^[ \t>#*_-]*(?:final[ ]+)?answer[ \t*_]*:[ \t*_]*([^\s*_][^\n]*)", re.MULTILINE | re.IGNORECASE)
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_LAYOUT_BEFORE = re.compile(r"(?:[\s*$]|\\[(\[])*")
_LAYOUT_AFTER = re.compile(r"(?:[\s*$]|(?<!\\right)\.|\\[)\]])*\Z")
_NUMBER = re.compile(r"[-+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?", re.ASCII)
_COMMANDS = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")


def final_answer(text: str) -> str:
    r"""The last marked answer without what is mere layout; empty where there is none.

    The last mark wins, as a worked solution may box intermediate results; of `Answer: $\boxed{34}$.` the inner one.
    """
    _, answer = max(_marked(text), default=(0, ""))
    if len(answer) > MAX_LENGTH:
        return ""
    answer = answer[_LAYOUT_BEFORE.match(answer).end() :]  # type: ignore[union-attr]  # it matches anything
    return _LAYOUT_AFTER.sub("", answer)


def number(text: str) -> Decimal | None:
    r"""The number that an answer is; None where it is none.

    Thousands separators, currency signs, a percent sign and a final full stop do not count: `\$1,200.` is 1200.
    """
    text = text.strip().replace("−", "-").replace("{,}", ",")
    text = text.removesuffix(".").removesuffix("%").rstrip("\\ ").removeprefix("\\").lstrip("$€£ ")
    if len(text) > MAX_LENGTH or _NUMBER.fullmatch(text) is None:
        return None
    return Decimal(text.replace(",", ""))


def final_number(text: str) -> Decimal | None:
    """The number that the last marked answer is; None where there is none."""
    return number(final_answer(text))


def is_prose(text: str) -> bool:
    """Whether text without a mark is words, such as a solution whose mark was forgotten, and no answer itself."""
    words = re.findall(r"[^\W\d_]{3,}", _COMMANDS.sub(" ", text))
    return len(text) > MAX_LENGTH or "\n" in text or len(words) > 1 or (bool(words) and not re.search(r"\d", text))


def _marked(text: str) -> Iterator[tuple[int, str]]:
    """Every marked answer, after the place where it begins."""
    for line in (_HASHES, _LINE):
        for mark in line.finditer(text):
            yield mark.start(1), mark[1]
    opened: list[tuple[bool, int]] = []
    for brace in _BRACES.finditer(text):
        if brace[0] == "{" or brace[0].startswith("\\boxed"):
            opened.append((len(brace[0]) > 1, brace.end()))
        elif brace[0] == "}" and opened:
            is_boxed, start = opened.pop()
            if is_boxed:
                yield start, text[start : brace.start()]
