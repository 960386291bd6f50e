"""Checkpoints: complete or not there, verified before they are used, and not more of them than asked for.

    step_12/
        manifest.json       SHA-256 of every other file
        trainer.json        TrainerState
        config.json         the settled configuration
        optimizer.pt        the optimiser's whole state, for any number of ranks
        model/              Hugging Face format, with tokenizer: from_pretrained opens it

There is no random state to save: every random choice follows from grpo.seed and the step it is made in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from slurmkit.config.schema import Checkpointing
from slurmkit.errors import Failure, NodeFailure

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where a run stands after `step`. `position` counts tasks drawn, `updates` optimiser steps made."""

    step: int
    position: int
    updates: int
    steps_without_signal: int
    tasks_digest: str
    metrics: Mapping[str, float]


class Checkpoints:
    """The step_N/ of one run directory."""

    def __init__(self, run_directory: Path, config: Checkpointing) -> None:
        self._run_directory = run_directory
        self._config = config

    async def save(self, state: TrainerState, write: Callable[[Path], Awaitable[None]]) -> Path:
        """Write step_N beside its place, rename it, then let go of what need not be kept.

        `write` puts the model, its tokenizer, the optimiser and the configuration into the folder it is given. Failure
        says why it could not be written, and what room there is; then nothing has changed.
        """
        folder = self._run_directory / f"step_{state.step}"
        unfinished = self._run_directory / f".step_{state.step}.unfinished"
        for left in self._run_directory.glob(".step_*"):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            unfinished.mkdir()
            await write(unfinished)
            (unfinished / "trainer.json").write_text(json.dumps(asdict(state), indent=1))
            (unfinished / "manifest.json").write_text(json.dumps(_digests(unfinished), indent=1))
            flush(unfinished)
            if folder.exists():  # found damaged when the run was taken up again
                self._remove(folder)
            os.replace(unfinished, folder)
            _flush_file(self._run_directory)
        except NodeFailure:
            raise
        except (OSError, Failure) as error:
            room = shutil.disk_usage(self._run_directory).free / 2**20
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = "".join(f"; {path.name} stays as it is" for path in self.all()[-1:])
            raise Failure(f"{folder} cannot be saved, with {room:,.1f} MiB left on its disk: {error}{kept}") from error
        self._prune()
        return folder

    def newest_good(self, say: Callable[[str], None]) -> tuple[Path, TrainerState] | None:
        """The newest checkpoint whose files are what was written. `say` hears of each one that is passed over."""
        for folder in reversed(self.all()):
            problem = problem_of(folder)
            if problem is None:
                return folder, state_of(folder)
            say(f"{folder} is damaged and passed over: {problem}")
        return None

    def all(self) -> list[Path]:
        """The folders of all checkpoints, good or not, oldest first."""
        found = [path for path in self._run_directory.glob("step_*") if path.name[5:].isdigit()]
        return sorted(found, key=step_of)

    def _prune(self) -> None:
        folders, keep = self.all(), self._config.keep_top_k
        if keep is None:
            return
        # Of equally good ones the newer is better: it has seen more.
        ranked = sorted(folders, key=lambda folder: (self._value(folder), step_of(folder)), reverse=True)
        for folder in ranked[keep:]:
            if folder != folders[-1]:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        # Renamed first: one that is killed in between leaves nothing that looks like a damaged checkpoint.
        removed = self._run_directory / f".{folder.name}.removed"
        os.replace(folder, removed)
        shutil.rmtree(removed)

    def _value(self, folder: Path) -> float:
        name = self._config.metric_name
        if name is None:
            return 0.0
        try:
            value = state_of(folder).metrics.get(name, float("-inf"))
        except (OSError, ValueError, TypeError):
            return float("-inf")  # a damaged one is the first to go
        return value if self._config.higher_is_better else -value


def flush(folder: Path) -> None:
    """Have everything under `folder` on the disk, so that no power failure can empty it after a rename."""
    for path in (*folder.rglob("*"), folder):
        _flush_file(path)


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_of(folder: Path) -> int:
    """The N of step_N."""
    return int(folder.name[5:])


def state_of(folder: Path) -> TrainerState:
    """What trainer.json of a checkpoint says."""
    return TrainerState(**json.loads((folder / "trainer.json").read_text()))


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            with path.open("rb") as file:
                digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where all is well."""
    try:
        written = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read: {error}"
    found = _digests(folder)
    for name, digest in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written: its SHA-256 differs from manifest.json"
    return None
