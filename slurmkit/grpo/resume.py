"""Where a run starts from: anew, its own newest good checkpoint, or one that it was told."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from slurmkit.config.resume import differences
from slurmkit.config.schema import TrainConfig
from slurmkit.config.validate import shown
from slurmkit.errors import UserError
from slurmkit.grpo.checkpoint import CONFIG_FILE, Checkpoints, TrainerState, problem_of, state_of, step_of
from slurmkit.grpo.metrics import say

_SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


def starting_point(checkpoints: Checkpoints, config: TrainConfig) -> tuple[Path, TrainerState] | None:
    """The checkpoint that `checkpointing.resume` asks for and its state, None for a fresh start.

    UserError where it cannot be had, where it would lead to overwriting others, and, with every key in one message,
    where the configuration trains something else.
    """
    resume, present = config.checkpointing.resume, checkpoints.all()
    if resume == "auto" or (present and _follows()):
        found = checkpoints.newest_good(say)
    elif resume == "never":
        _refuse_to_overwrite(present, "starting anew")
        found = None
    else:
        found = _told(Path(resume).absolute(), present)
    if found is not None and (problems := list(_misfits(found[0], config))):
        raise UserError("\n".join([*problems, "Put it back, or give the run a name and directory of its own"]))
    return found


def _follows() -> bool:
    """Whether this attempt follows another of the same submission: then the run's own checkpoints come first.

    The bring-up says so in the attempt's folder, which it names in SK_ATTEMPT_DIR.
    """
    try:
        start = json.loads(Path(os.environ["SK_ATTEMPT_DIR"], "start.json").read_text(encoding="utf-8"))
        return int(start["attempt"]) > 1
    except (KeyError, OSError, ValueError):
        return False


def _told(folder: Path, present: list[Path]) -> tuple[Path, TrainerState]:
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"checkpointing.resume: {folder} is no checkpoint, as it holds no manifest.json; it must be auto, never or "
            "the folder of a checkpoint, such as results/NAME/step_20"
        )
    if problem := problem_of(folder):
        raise UserError(f"checkpointing.resume: {folder} is damaged: {problem}")
    state = state_of(folder)
    own = next((path for path in present if path.samefile(folder)), None)
    later = [path for path in present if own is None or step_of(path) > state.step]
    _refuse_to_overwrite(later, f"going on from {folder}")
    return own or folder, state


def _refuse_to_overwrite(present: list[Path], what: str) -> None:
    if present:
        raise UserError(
            f"checkpointing.resume: {present[0].parent} holds {', '.join(path.name for path in present)}, which "
            f"{what} would overwrite. Give this run a name and directory of its own, remove them, or set it to auto "
            "to go on from the newest"
        )


def _misfits(folder: Path, config: TrainConfig) -> Iterator[str]:
    try:
        trained = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        say(f"{folder} is of an older slurmkit and does not say what it was trained with: nothing is compared")
        return
    for key, before, now in differences(trained, config.model_dump(mode="json")):
        yield (
            f"{key}: the checkpoint {folder.name} was trained with {shown(before)}, the configuration says {shown(now)}"
        )
    name = config.policy.model_name
    if name is not None and trained["policy"].get("model_name") == name and (Path(name) / "config.json").is_file():
        # The same name may hold another model by now.
        old, new = (json.loads((path / "config.json").read_text()) for path in (folder / "model", Path(name)))
        for key in _SHAPE:
            if key in old and key in new and old[key] != new[key]:
                yield (
                    f"policy.model_name: {name} has {key} {shown(new[key])} now, the checkpoint {folder.name} has "
                    f"{shown(old[key])}"
                )
