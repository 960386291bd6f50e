"""Checkpoints: complete or not there, verified before they are used, and not more of them than asked for.

    step_12/
        manifest.json       SHA-256 of every other file
        trainer.json        TrainerState
        config.json         the settled configuration
        optimizer.pt        the optimiser's whole state, for any number of ranks
        model/              Hugging Face format, with tokenizer: from_pretrained opens it
    latest -> step_12       the newest
    best -> step_8          by checkpointing.metric_name, once one has that metric

There is no random state to save: every random choice follows from grpo.seed and the step it is made in.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from slurmkit.config.schema import Checkpointing
from slurmkit.errors import Failure, NodeFailure
from slurmkit.grpo.metrics import say

CONFIG_FILE = "config.json"
_ENDS = 1 << 20


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where a run stands after `step`. `position` counts tasks drawn, `updates` optimiser steps made.

    `starting_digest` is of the model that is still needed beside the trained one (a reference, adapters' base), and ""
    where none is.
    """

    step: int
    position: int
    updates: int
    steps_without_signal: int
    tasks_digest: str
    metrics: Mapping[str, float]
    starting_digest: str = ""


class Checkpoints:
    """The step_N/ of one run directory."""

    def __init__(self, run_directory: Path, config: Checkpointing) -> None:
        self._run_directory = run_directory
        self._config = config

    async def save(self, state: TrainerState, write: Callable[[Path], Awaitable[Mapping[str, str] | None]]) -> Path:
        """Write step_N beside its place, rename it, then let go of what need not be kept.

        `write` puts the model, its tokenizer, the optimiser and the configuration into the folder it is given, and may
        return the SHA-256 of files there that it knows. Failure says why it could not be written, and what room there
        is; then nothing has changed. What takes long leaves the event loop to others.
        """
        folder = self._run_directory / f"step_{state.step}"
        unfinished = self._run_directory / f".step_{state.step}.unfinished"
        try:
            await asyncio.to_thread(self._make, unfinished)
            digests = await write(unfinished)
            await asyncio.to_thread(self._complete, state, unfinished, folder, digests or {})
        except NodeFailure:
            raise
        except (OSError, Failure) as error:
            room = shutil.disk_usage(self._run_directory).free / 2**20
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = "".join(f"; {path.name} stays as it is" for path in self.all()[-1:])
            raise Failure(f"{folder} cannot be saved, with {room:,.1f} MiB left on its disk: {error}{kept}") from error
        await asyncio.to_thread(self._tidy)
        return folder

    def _make(self, unfinished: Path) -> None:
        for left in self._run_directory.glob(".step_*"):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir()

    def _complete(self, state: TrainerState, unfinished: Path, folder: Path, digests: Mapping[str, str]) -> None:
        (unfinished / "trainer.json").write_text(json.dumps(asdict(state), indent=1))
        (unfinished / "manifest.json").write_text(json.dumps(digests_of(unfinished, digests), indent=1))
        flush(unfinished)
        if folder.exists():  # found damaged when the run was taken up again
            self._remove(folder)
        os.replace(unfinished, folder)
        _flush_file(self._run_directory)

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

    def _tidy(self) -> None:
        """Renew the links, then remove what they and keep_top_k do not ask for."""
        folders, keep = self.all(), self._config.keep_top_k
        ranks = {folder: self._rank(folder) for folder in folders}
        ranked = sorted(folders, key=ranks.__getitem__, reverse=True)
        has_best = self._config.metric_name is not None and ranks[ranked[0]][0]
        try:
            self._link("latest", folders[-1])
            self._link("best", ranked[0] if has_best else None)
            for folder in ranked[keep:] if keep is not None else ():
                if folder != folders[-1]:
                    self._remove(folder)
        except OSError as error:
            say(f"links and old checkpoints in {self._run_directory} stay as they are: {error}")

    def _link(self, name: str, folder: Path | None) -> None:
        link, beside = self._run_directory / name, self._run_directory / f".{name}.unfinished"
        beside.unlink(missing_ok=True)
        if folder is None:
            link.unlink(missing_ok=True)
            return
        beside.symlink_to(folder.name)
        os.replace(beside, link)

    def _remove(self, folder: Path) -> None:
        # Renamed first: one that is killed in between leaves nothing that looks like a damaged checkpoint.
        removed = self._run_directory / f".{folder.name}.removed"
        os.replace(folder, removed)
        shutil.rmtree(removed)

    def _rank(self, folder: Path) -> tuple[bool, float, int]:
        """Return a sort key: a checkpoint with the metric first, then the better value, then the newer step.

        A checkpoint saved on SIGTERM or at the time limit can lack the metric, and a NaN is no value.
        """
        name, value = self._config.metric_name, 0.0
        if name is not None:
            try:
                value = float(state_of(folder).metrics.get(name, math.nan))
            except (OSError, ValueError, TypeError):
                value = math.nan  # damaged: remove it first
        if math.isnan(value):
            return False, 0.0, step_of(folder)
        return True, value if self._config.higher_is_better else -value, step_of(folder)


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


def digests_of(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The SHA-256 of every file under `folder` but the manifest, by its path there; `known` ones are not read."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != "manifest.json":
            digests[name] = known.get(name) or _digest(path)
    return digests


def weights_digest(folder: Path) -> str:
    """Of a model's weights, as their files begin and end: enough to tell trainings apart, and read in no time."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem_of(folder: Path, part: str = "") -> str | None:
    """What is wrong with a checkpoint, or with its files whose paths begin with `part`; None where all is well."""
    try:
        written = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read: {error}"
    for name, digest in written.items():
        if not name.startswith(part):
            continue
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is not what was written: its SHA-256 differs from manifest.json"
    return None
