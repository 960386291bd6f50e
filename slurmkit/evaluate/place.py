"""Where an evaluation is kept: evaluate/NAME.json of the run directory, with files of its own in evaluate/NAME/."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from slurmkit.errors import Failure, UserError
from slurmkit.evaluate.models import Model


def place_for(model: Model, kind: str, name: str | None) -> Path:
    """The file that the evaluation will be written to; none is there. Nothing is written yet.

    In the run directory, or for a model that is from none, in the present one. `name` left out, the kind of evaluation
    and the checkpoint give it, with a number where that is taken. UserError for a name that cannot be or is taken.
    """
    folder = (model.run or Path.cwd()) / "evaluate"
    if name is None:
        stem = f"{kind}-{model.path.parent.name if model.run else model.name}"
        names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        return next(path for each in names if not _is_taken(path := folder / f"{each}.json"))
    if re.fullmatch(r"[\w.+-]+", name) is None or name.startswith("."):
        raise UserError(f"--name {name}: should be letters, digits and any of _ . + -, not with a dot in front")
    if _is_taken(path := folder / f"{name}.json"):
        raise UserError(f"--name {name}: {path} is there already; give another, or leave --name out")
    return path


def _is_taken(path: Path) -> bool:
    return path.exists() or path.with_suffix("").exists()


def keep(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result beside its place and rename it. Failure where that cannot be."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Failure(f"{path} cannot be written: {error.strerror}") from None
