"""What is evaluated: a run, one of its checkpoints, or any folder that holds a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurmkit.errors import Failure, UserError
from slurmkit.grpo.checkpoint import problem_of, weights_digest
from slurmkit.grpo.export import checkpoint_of


@dataclass(frozen=True, slots=True)
class Model:
    """A model's folder, what it is called, and the run directory that it is from, if it is from one."""

    path: Path
    name: str
    run: Path | None = None

    def record(self) -> dict[str, Any]:
        """For JSON: enough to tell later what was evaluated."""
        return {"name": self.name, "path": str(self.path), "weights": weights_digest(self.path)}


def find_model(source: Path, step: str | None = None) -> Model:
    """The model of a run directory, of which `step` is as in `slurmkit export`, of a checkpoint, or in a folder.

    UserError where there is none, Failure where the checkpoint is damaged.
    """
    if (source / "manifest.json").is_file() or any(source.glob("step_*/manifest.json")):
        checkpoint = checkpoint_of(source, step)
        if problem := problem_of(checkpoint, "model/"):
            raise Failure(f"{checkpoint} is damaged: {problem}")
        return Model(checkpoint / "model", f"{checkpoint.parent.name}/{checkpoint.name}", checkpoint.parent)
    if not (source / "config.json").is_file() or not _weights_of(source):
        raise UserError(
            f"{source}: no checkpoint: it must be a run directory with a step_N/, a step_N/ itself, or a model's "
            "folder with config.json and its weights (*.safetensors)"
        )
    if step is not None:
        raise UserError(f"--step {step}: {source} is a model's folder, without steps; leave --step out")
    return Model(source, source.name)


def find_baseline(name: str) -> Model:
    """The model that training is compared with: as `find_model` finds it, or on the hub. UserError where it is not."""
    if Path(name).is_dir():
        return find_model(Path(name))
    from slurmkit.grpo.from_scratch import model_folder  # and torch, which what is wrong with a folder is told without

    return Model(model_folder(name, "--baseline"), name)


def _weights_of(folder: Path) -> list[Path]:
    """The files of a model's weights."""
    return sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
