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
        """`resume_after`: the step of the checkpoint that the run goes on from, None for a fresh start."""
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
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
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
        self._file.write(
            (json.dumps({"step": step, "last_step": self._last_step, **metrics}, allow_nan=False) + "\n").encode()
        )
        shown = [form.format(metrics[name]) for name, form in _SHOWN if name in metrics]
        say(f"step {step}/{self._last_step}  " + "  ".join(shown))
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


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
        id_file.write_text(secrets.token_hex(4))
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
