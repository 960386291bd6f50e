"""The environment of bfcl-eval, whose pinned packages go with nothing else.

Of the 32 packages that it asks for, most are the client libraries of vendors, and vector stores for categories that v3
has not: gigabytes. What judges v3's categories and asks an OpenAI-compatible server is here, all of it, in 180 MB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from slurmkit.errors import Failure, UserError
from slurmkit.processes import end_with_parent

BFCL_EVAL = "bfcl-eval==2026.3.23"
# At the versions that it pins, where it does.
NEEDS = (
    "filelock==3.20.0",
    "mpmath==1.3.0",
    "numpy==1.26.4",
    "openai>=1.86,<3",
    "overrides>=7,<8",
    "pandas>=2,<4",
    "pydantic>=2.8.2,<3",
    "python-dotenv>=1.0.1,<2",
    "requests>=2,<3",
    "tenacity>=8.5,<10",
    "tqdm>=4,<5",
    "tree_sitter==0.21.3",
    "tree-sitter-java==0.21.0",
    "tree-sitter-javascript==0.21.4",
)
_DEADLINE_SECONDS = 1800.0


def bfcl_python(given: Path | None, cache: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment that has bfcl-eval: the one that was given, or one that is made in `cache` once.

    UserError where the given one cannot import it, Failure where the environment cannot be made.
    """
    if given is not None:
        try:
            tried = subprocess.run([given, "-I", "-c", "import bfcl_eval"], capture_output=True, text=True, timeout=300)
        except OSError as error:
            raise UserError(f"--bfcl-python {given}: {error.strerror}") from None
        if tried.returncode:
            reason = tried.stderr.strip().splitlines()[-1:] or [f"exit code {tried.returncode}"]
            raise UserError(f"--bfcl-python {given}: it cannot import bfcl_eval: {reason[0]}")
        return given
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"{BFCL_EVAL.partition('==')[2]}-python{version}"
    if not folder.exists():
        say(f"installing {BFCL_EVAL} into {folder}, once")
        _make(folder)
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    """Beside its place, and renamed: nobody finds half of one, and of two who make it, one is kept."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    pip = [str(beside / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile"]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = [sys.executable, "-m", "venv", str(beside)]
        for command in (made, [*pip, *NEEDS], [*pip, "--no-deps", BFCL_EVAL]):
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_DEADLINE_SECONDS,
                preexec_fn=end_with_parent,
            )
            if done.returncode:
                shown = "\n".join(done.stdout.strip().splitlines()[-5:])
                raise Failure(
                    f"{folder}: an environment for {BFCL_EVAL} cannot be made; give one with --bfcl-python:\n{shown}"
                )
        if not folder.exists():
            os.rename(beside, folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        if not folder.exists():
            raise Failure(f"{folder}: an environment for {BFCL_EVAL} cannot be made: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
