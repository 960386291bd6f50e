"""The documentation's pages, their code, and what stands in for the names in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from parts import REPOSITORY

PAGES = sorted(
    [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")],
    key=lambda path: str(path.relative_to(REPOSITORY)),
)
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in PAGES}

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4,}.*\n)+)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


class Block(NamedTuple):
    """Some lines of shell. Example: Block("docs/doctor.md", "slurmkit doctor\\n")."""

    page: str
    text: str


def shell_blocks(page: str) -> Iterator[Block]:
    """What a page shows to be typed: fenced blocks of sh, and indented ones that begin with one of our programs."""
    text = TEXTS[page]
    for _, language, body in _FENCE.findall(text):
        if language == "sh":
            yield Block(page, body)
    for body in _INDENTED.findall(_FENCE.sub("", text) + "\n"):
        if is_ours(body.lstrip()):
            yield Block(page, re.sub(r"^ {4,6}", "", body, flags=re.MULTILINE))


def spans(page: str) -> Iterator[str]:
    """All code inside of a page's sentences, each in one line."""
    for found in _SPAN.findall(_FENCE.sub("", TEXTS[page])):
        yield " ".join(found.split())


def is_ours(line: str) -> bool:
    """Whether a line starts one of this repository's programs."""
    return (
        re.match(r"(slurmkit |python -m slurmkit|(\./)?scripts/|(sudo )?(python )?benchmarks/\w+\.py)", line)
        is not None
    )
