"""docs/troubleshooting.md quotes messages that there are, and has every one that names no way out itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.requirements import REPOSITORY

PAGE = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
PACKAGE = REPOSITORY / "slurmkit"
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE.partition("## By message")[2], re.MULTILINE)
# What is passed on whole, in another's words.
WORDLESS = 8


def plain(node: ast.expr) -> str:
    """The text that an expression makes, with … for what is only known as it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(plain, parts))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return plain(left) + plain(right)
    return "…"


def raised(*names: str) -> Iterator[tuple[Path, str]]:
    """Every message that a `raise` of one of these makes, outside of the benchmarks."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] == "bench":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[message, *_])) if name in names:
                    yield path, plain(message)


def quotes(quoted: str, text: str) -> bool:
    """Whether the quoted message, each … of which is anything, begins or is a part of the text."""
    pattern = ".*?".join(map(re.escape, quoted.replace("…", "\0").split("\0")))
    return re.search(pattern, text, re.DOTALL) is not None


@pytest.fixture(scope="module")
def all_texts() -> str:
    """Every text of the package's code, and the templates."""
    code = (ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py"))
    found = [plain(node) for tree in code for node in tree if isinstance(node, ast.expr)]
    templates = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "templates").rglob("*.j2")]
    return "\n".join(dict.fromkeys([*found, *(line for text in templates for line in text.splitlines())]))


def test_every_quoted_message_is_one_that_slurmkit_says(all_texts: str) -> None:
    assert len(QUOTED) > 50
    lines = all_texts.splitlines()
    for quoted in QUOTED:
        assert any(quotes(quoted, line) for line in lines), f"nothing says {quoted!r}"


def test_every_failure_that_is_not_the_user_s_mistake_is_explained() -> None:
    for path, text in raised("Failure", "NodeFailure", "NoAnswer"):
        if len(text.replace("…", "")) < WORDLESS:
            continue
        assert any(quotes(quoted, text) for quoted in QUOTED), f"{path.relative_to(REPOSITORY)} says {text!r}"


def test_every_exit_code_of_ours_has_its_row() -> None:
    rows = PAGE.partition("## By exit code")[2].partition("## ")[0]
    source = (PACKAGE / "errors.py").read_text(encoding="utf-8")
    for code in sorted(set(re.findall(r"(?:exit_code|INTERRUPTED) = (\d+)", source))):
        assert f"| {code} |" in rows


@pytest.mark.parametrize(
    ("trouble", "way_out"),
    [
        ("hub answers with 429", "HF_HUB_OFFLINE: 1"),
        ("vLLM process of an earlier run", "slurmkit cleanup"),
        ("an old Ray", "slurmkit cleanup"),
        ("CUDA says that it is out of memory", "tensor_parallel_size"),
        ("NeMo RL takes long to start", "NRL_FORCE_REBUILD_VENVS=true"),
    ],
)
def test_every_row_of_nemo_gym_s_own_table_has_one_here(trouble: str, way_out: str) -> None:
    """The five of its page "Single Node Training"."""
    rows = PAGE.partition("## By what you see")[2].partition("## ")[0].splitlines()
    (row,) = (row for row in rows if trouble in row)
    assert way_out in row
