"""Which template comes from where, and what an override changes."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches, unified_diff
from pathlib import Path

from jinja2 import TemplateNotFound, nodes

from slurmkit.errors import UserError
from slurmkit.job.render import PACKAGED, environment_for, names_in, place_of


def overview(folders: tuple[Path, ...]) -> dict[str, list[Path]]:
    """For each template's name the files of that name, the one in force first."""
    found: dict[str, list[Path]] = {}
    for folder in (*folders, PACKAGED):
        for name in names_in(folder):
            found.setdefault(name, []).append(folder / name)
    return dict(sorted(found.items()))


def source(name: str, folders: tuple[Path, ...]) -> tuple[str, str]:
    """File and text of a template. UserError names the nearest where there is none of that name."""
    environment = environment_for(folders)
    assert environment.loader is not None
    try:
        text, file, _ = environment.loader.get_source(environment, name)
    except TemplateNotFound:
        known = overview(folders)
        hint = "".join(get_close_matches(name, known, n=1))
        raise UserError(
            f"there is no template {name!r}"
            + (f"; the nearest is {hint}" if hint else f": there are {', '.join(known)}")
        ) from None
    except Exception as error:
        raise UserError(f"{place_of(error) or name}: {error}") from None
    return str(file), text


def differences(name: str, folders: tuple[Path, ...]) -> str:
    """A unified diff from the packaged file to the one in force, or from each block that it overrides."""
    file, text = source(name, folders)
    plain = name.removeprefix("slurmkit/").removeprefix("site/")
    if not (PACKAGED / plain).is_file():
        return _diff("/dev/null", file, "", text)
    packaged = (PACKAGED / plain).read_text(encoding="utf-8")
    try:
        tree = environment_for(folders).parse(text, name, file)
    except Exception as error:
        raise UserError(f"{place_of(error) or file}: {error}") from None
    if tree.find(nodes.Extends) is None:
        return _diff(str(PACKAGED / plain), file, packaged, text)
    ours = dict(_blocks(packaged))
    return "".join(
        _diff(f"{PACKAGED / plain} block {block}", f"{file} block {block}", ours.get(block, ""), theirs)
        for block, theirs in _blocks(text)
    )


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each outermost block, as written."""
    depth, name, start, position = 0, "", 0, 0
    words: list[str] | None = None
    for _, kind, value in environment_for(()).lex(text):
        if kind == "block_begin":
            begin, words = position, []
        position += len(value)
        if words is not None and kind == "name":
            words.append(value)
        if kind == "block_end" and words is not None:
            depth += {"block": 1, "endblock": -1}.get(words[0], 0) if words else 0
            if words[:1] == ["block"] and depth == 1:
                name, start = words[1], position
            elif words[:1] == ["endblock"] and depth == 0:
                yield name, text[start:begin]
            words = None


def _diff(old: str, new: str, before: str, after: str) -> str:
    lines = unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), old, new)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
