"""Where a run's figures go: metrics.jsonl always, the console, and W&B and TensorBoard when asked.

Names: docs/metrics.md. One line per step; step 0 is the model before training, and `last_step` says in every line how
many there will be.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from slurmkit.config.log_dir import METRICS
from slurmkit.config.schema import TrainConfig
from slurmkit.errors import Failure
from slurmkit.grpo.interrupt import Interrupted
from slurmkit.grpo.wandb_run import WandbRun

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
        # Resolved, as it may be a link into logger.log_dir, and replacing the link would leave that file behind.
        self._path = (run_directory / METRICS).resolve()
        self._last_step = last_step
        if resume_after is None:
            self._path.write_bytes(b"")
        else:
            self._forget_after(resume_after)
        self._file = self._path.open("ab", buffering=0)
        self._wandb = WandbRun(run_directory, config) if config.logger.wandb_enabled else None
        logs_events = config.logger.tensorboard_enabled
        self._tensorboard = _tensorboard_writer(run_directory, resume_after) if logs_events else None

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
            self._wandb.log(step, metrics)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def show(self, name: str, path: Path) -> None:
        """Let people see the conversations that a step has just kept, `name` being `train` or `val`."""
        if self._wandb is not None:
            self._wandb.show(name, path)

    def flush(self) -> None:
        """Have all lines on the disk: a checkpoint must not outlive the lines before it."""
        os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
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


# What a step consists of, one after the other.
_PHASES = ("rollout", "logprobs", "update", "weights", "validation", "checkpoint")


@contextmanager
def whole_step(metrics: dict[str, float]) -> Iterator[None]:
    """Put the seconds that the block takes under `time:step`, those that no phase in it took under `time:other`."""
    with timed(metrics, "time:step"):
        yield
    metrics["time:other"] = metrics["time:step"] - sum(metrics.get(f"time:{phase}", 0.0) for phase in _PHASES)


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Failure where a figure is NaN or infinite: nothing that follows from such a step is worth making, or saving."""
    diverged = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if diverged:
        raise Failure(
            f"step {step} has diverged and is not saved: {', '.join(diverged)}. A smaller policy.optimizer.kwargs.lr "
            "or policy.max_grad_norm may help; the run goes on from its newest checkpoint"
        )


def _tensorboard_writer(run_directory: Path, resume_after: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # What was logged of steps that are about to be made again, or of another run in this folder, does not count.
    return SummaryWriter(run_directory / "tensorboard", purge_step=0 if resume_after is None else resume_after + 1)
