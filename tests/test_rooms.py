"""The walls of the house: which room may import what, and how large each may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.requirements import REPOSITORY

PACKAGE = REPOSITORY / "slurmkit"
HEAVY = {"torch", "ray", "vllm", "transformers", "wandb", "datasets", "pyarrow"}
LOGIN_NODE = {"cli", "job", "slurm", "run", "config", "doctor"}
TRAINER = {"grpo", "generation", "rollout", "envs"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_room_may_know(path: Path) -> None:
    room, names = room_of(path), imports_of(path)
    rooms = {name.split(".")[1] for name in names if name.startswith("slurmkit.")}
    if room in LOGIN_NODE:
        assert not {name.split(".")[0] for name in names} & HEAVY
        assert not rooms & (TRAINER | {"bench", "evaluate"})
    if room in TRAINER:
        assert not rooms & {"cli", "job", "slurm", "run"}, "the trainer knows nothing of Slurm"
        assert "evaluate" not in rooms, "it asks the trainer's parts, not they it"
    if room == "evaluate":
        assert not rooms & {"cli", "job", "slurm", "run", "bench"}
    if path.name == "bfcl_side.py":
        assert not rooms, "it runs where slurmkit is not installed"
    if room == "keeper":
        assert {name.partition(".")[0] for name in names} - {"slurmkit"} <= sys.stdlib_module_names
        assert rooms <= {"keeper"}, "it runs where slurmkit is not installed"
    if room == "report":
        assert not rooms - {"report", "errors"}, "a report reads the run directory's files and nothing else"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_has_more_than_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_no_two_rooms_import_each_other() -> None:
    edges = {
        (room_of(path), name.split(".")[1])
        for path in FILES
        for name in imports_of(path)
        if name.startswith("slurmkit.") and name.split(".")[1] != room_of(path) and room_of(path)
    }
    assert not {edge for edge in edges if edge[::-1] in edges}


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["render", "--", "true"]])
def test_the_launcher_runs_without_loading_the_trainer_s_libraries(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from slurmkit.cli.main import main\n"
        "sys.argv[1:] = sys.argv[1:]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
