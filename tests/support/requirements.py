"""What the tests need from the machine. A missing part skips on a laptop and fails under CI=true."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SLURMKIT = Path(sys.executable).with_name("slurmkit")
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# Values that break careless quoting.
HOSTILE = [
    "a b",
    "it's",
    '"',
    "$HOME",
    "`id`",
    "$(id)",
    "a;b",
    "}",
    "x\ny\n",
    "é漢🙂",
    "%j %x 100%",
    "\\",
    "*",
    "#",
    "-n",
    "",
    "A=b",
]


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where every part must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"under CI=true nothing may be missing: {reason}")
    pytest.skip(reason)


def need_shared_data(relative: str) -> Path:
    """A file of ../shared/data, which the project does not ship."""
    path = SHARED_DATA / relative
    if not path.exists():
        missing(f"needs {path}")
    return path


def need_smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, a real pretrained model."""
    path = REPOSITORY / "models" / "smollm2-135m"
    if not (path / "config.json").exists():
        missing(f"needs {path} (scripts/get_smollm2 makes it)")
    return path


def need_slurm() -> None:
    """Root and Debian's Slurm: what scripts/devcluster needs."""
    if os.geteuid() != 0:
        missing("a development cluster needs root")
    for program in ("slurmctld", "slurmd", "munged", "ip", "unshare"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed (scripts/test installs it as root on Debian)")


def need_gpu() -> None:
    """A GPU, which no machine that builds this project has: these tests skip without one, also under CI=true."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """What a part sets for its own processes, vLLM LD_PRELOAD among it, is not for those that other tests start."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
