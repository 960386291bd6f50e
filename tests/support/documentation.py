"""The documentation's pages, their code, and what stands in for the names in it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.requirements import REPOSITORY

PAGES = sorted(
    [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")],
    key=lambda path: str(path.relative_to(REPOSITORY)),
)
TEXTS = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in PAGES}

# In which blocks of a page may be; commands are looked for in all of them.
LANGUAGES = ("sh", "", "yaml", "json", "python", "jinja")

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4,}.*\n)+)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


class Block(NamedTuple):
    """Some lines of shell. Example: Block("docs/doctor.md", "slurmkit doctor\\n")."""

    page: str
    text: str


def shell_blocks(page: str) -> Iterator[Block]:
    """What a page shows to be typed: blocks of sh, what follows a prompt, and whatever else has a line of ours."""
    text = TEXTS[page]
    for _, language, body in _FENCE.findall(text):
        assert language in LANGUAGES, f"{page}: nobody reads a block of {language}"
        typed = re.findall(r"^\$ (.*\n)", body, re.MULTILINE)
        if language == "sh" or any(map(is_ours, body.splitlines())):
            yield Block(page, body)
        elif typed:
            yield Block(page, "".join(typed))
    for body in _INDENTED.findall(_FENCE.sub("", text) + "\n"):
        plain = re.sub(r"^ {4,6}(?=\S)", "", body, flags=re.MULTILINE)
        if any(map(is_ours, plain.splitlines())):
            yield Block(page, plain)


def yaml_blocks(page: str) -> Iterator[str]:
    """What a page shows to be written into a file."""
    text = TEXTS[page]
    yield from (body for _, language, body in _FENCE.findall(text) if language == "yaml")
    for body in _INDENTED.findall(_FENCE.sub("", text) + "\n"):
        plain = textwrap.dedent(body)
        if re.match(r"\w+:( \{|\n)", plain):
            yield plain


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
