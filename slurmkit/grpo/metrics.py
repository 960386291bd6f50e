"""Where a run's figures go: metrics.jsonl always, the console, and W&B when asked.

Names: `train:…` of the step's rollouts and update, `val:…` of validation tasks, `time:…` seconds. One line per step;
step 0 is the model before training, and `last_step` says in every line how many there will be.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import Failure
from slurmkit.grpo.interrupt import Interrupted

_SHOWN = (
    ("train:reward_mean", "reward {:.3f}"),
    ("train:loss", "loss {:+.4f}"),
    ("train:groups_with_signal", "groups with signal {:.0f}"),
    ("val:accuracy", "accuracy {:.3f}"),
    ("time:step", "{:.2f} s"),
)


class RunLog:
    """Writes one line per step. Used as a context, so that W&B is finished with the run's outcome."""

    def __init__(self, run_directory: Path, config: TrainConfig, *, last_step: int, resume_after: int | None) -> None:
        """`resume_after`: the step of the run's own checkpoint that it goes on from, None for a fresh file."""
        self._path = run_directory / "metrics.jsonl"
        self._last_step = last_step
        if resume_after is None:
            self._path.write_bytes(b"")
        else:
            self._forget_after(resume_after)
        self._file = self._path.open("ab", buffering=0)
        self._wandb = _wandb_run(run_directory, config) if config.logger.wandb_enabled else None

    def _forget_after(self, step: int) -> None:
        """Steps after the checkpoint are about to be made again; a line cut short by a crash goes with them."""
        kept = []
        text = self._path.read_text(errors="replace") if self._path.exists() else ""
        for line in text.splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break
        beside = self._path.with_suffix(".unfinished")
        beside.write_text("".join(kept))
        os.replace(beside, self._path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log everything that is known of one step, once."""
        # One write() of a whole line: whoever follows the file never reads half of one.
        line = (json.dumps({"step": step, "last_step": self._last_step, **metrics}, allow_nan=False) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise Failure(f"{self._path} cannot be written: {error.strerror}") from None
        if written != len(line):
            raise Failure(f"{self._path} cannot be written: only {written} of {len(line)} bytes found room")
        shown = [form.format(metrics[name]) for name, form in _SHOWN if name in metrics]
        say(f"step {step}/{self._last_step}  " + "  ".join(shown))
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Have all lines on the disk: a checkpoint must not outlive the lines before it."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._wandb is None:
            return
        if kind is None or issubclass(kind, Interrupted):  # the next attempt goes on with it
            self._wandb.finish(exit_code=0)
        elif issubclass(kind, Exception):  # else we leave at once, and finishing may wait for the network
            self._wandb.finish(exit_code=1)


def say(message: str) -> None:
    """One line for whoever watches the run."""
    print(message, flush=True)


@contextmanager
def timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds that the block takes under `name`."""
    start = time.perf_counter()
    yield
    metrics[name] = time.perf_counter() - start


def _wandb_run(run_directory: Path, config: TrainConfig) -> Any:
    import wandb

    folder = run_directory / "wandb"
    folder.mkdir(exist_ok=True)
    # In the run directory and not in a checkpoint: an attempt that dies before its first save is the same run, too.
    id_file = folder / "run_id"
    if not id_file.exists():
        beside = id_file.with_name(".run_id.unfinished")
        beside.write_text(secrets.token_hex(4))
        os.replace(beside, id_file)
    return wandb.init(
        project=config.logger.wandb.project,
        name=config.logger.wandb.name,
        mode=config.logger.wandb.mode,
        id=id_file.read_text(),
        resume="allow",
        dir=run_directory,
        config=config.model_dump(mode="json"),
        # Nothing of the machine or its environment: the command line and the git state may hold what is private.
        settings=wandb.Settings(
            console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True, silent=True
        ),
    )
