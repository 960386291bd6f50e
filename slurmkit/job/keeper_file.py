"""The one file that a rendered job expects in its run directory: slurmkit/keeper/'s modules, one after the other."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "keeper"
_MODULES = ("meeting", "chain", "follow_up", "judge", "watch", "stand_in", "node", "main")
_OWN_IMPORT = re.compile(r"^from slurmkit\.keeper\.\w+ import [\w, ]+\n", re.MULTILINE)


@cache
def keeper_text() -> str:
    """The file. It runs on Python 3.6 without any package."""
    return _OWN_IMPORT.sub("", "\n\n".join((_FOLDER / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES))


@cache
def digest_of_keeper() -> str:
    """Its sha256, which the rendered file compares before it runs it."""
    return hashlib.sha256(keeper_text().encode()).hexdigest()


def name_of_keeper() -> str:
    """Another one for every keeper, so that a job that waits finds the one that it was rendered with."""
    return f"keeper-{digest_of_keeper()[:12]}.py"
