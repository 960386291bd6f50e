"""Rendering that knows for each line of the script which block of which template file it comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import nodes

from slurmkit.job.render import render
from slurmkit.job.sandbox import Sandbox
from slurmkit.job.spec import JobSpec

# Where a block of a file begins, and where it ends, in characters that stand in no script.
_MARK = re.compile("\ue000([^\ue001]*)\ue001([^\ue001]*)\ue001|\ue002")


@dataclass(frozen=True, slots=True)
class Traced:
    """A rendered script, and for each of its lines the file and the block that put it there."""

    script: str
    places: list[tuple[str, str]]
    parts: list[tuple[str, str]]
    """Every file and block that took part, also those that put out nothing."""

    def place(self, line: int) -> tuple[str, str]:
        """File and block of a line, counted from 1."""
        return self.places[min(line, len(self.places)) - 1]


def render_traced(spec: JobSpec, folders: tuple[Path, ...]) -> Traced:
    """As `render`, byte for byte, with the places."""
    text, script, within = render(spec, folders, Marked), "", [("", "")]
    places: list[tuple[str, str]] = []
    parts: list[tuple[str, str]] = []
    position = 0
    for mark in _MARK.finditer(text):
        script += text[position : mark.start()]
        places += [within[-1]] * (script.count("\n") - len(places))
        position = mark.end()
        if mark[1] is None:
            within.pop()
        else:
            # An included file belongs to the block that includes it.
            within.append((mark[1], mark[2] or within[-1][1]))
            parts.append(within[-1])
    return Traced(script + text[position:], places, parts)


class Marked(Sandbox):
    """Renders with marks, by which a line of the script is traced back to its file and block."""

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        for block in source.find_all(nodes.Block):
            block.body = _between(block.body, f"\ue000{filename}\ue001{block.name}\ue001", block.lineno)
        if source.find(nodes.Extends) is None:
            source.body = _between(source.body, f"\ue000{filename}\ue001\ue001", 1)
        return super()._generate(source, name, filename, defer_init)


def _between(body: list[nodes.Node], mark: str, line: int) -> list[nodes.Node]:
    before, after = (nodes.Output([nodes.TemplateData(text)], lineno=line) for text in (mark, "\ue002"))
    return [before, *body, after]
