"""When checkpoints are written, and how: behind the training, one at a time, each a copy of the step it is of."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from pathlib import Path
from types import TracebackType

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import Failure
from slurmkit.grpo.checkpoint import CONFIG_FILE, Checkpoints, TrainerState
from slurmkit.grpo.metrics import timed
from slurmkit.grpo.policy import Policy
from slurmkit.rollout.chat import Chat


class Saver:
    """Writes checkpoints while the training goes on. Used as a context, which ends with nothing being written."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        policy: Policy,
        chat: Chat,
        config: TrainConfig,
        *,
        saved: Path | None,
        started: float,
    ) -> None:
        """`saved` is the checkpoint that the run goes on from, `started` when it began, on time.monotonic's clock."""
        self._checkpoints = checkpoints
        self._policy = policy
        self._chat = chat
        self._config = config
        self._saved = saved
        self._writing: asyncio.Task[Path] | None = None
        self._is_logged = asyncio.Event()
        self._times: dict[str, float] = {}
        self.deadline = Deadline(config.checkpointing.must_save_by_seconds, started)

    async def copy(self, state: TrainerState) -> dict[str, float]:
        """Begin to save `state`; return when the training may go on, with what is to be logged of that.

        One save at a time: it waits for an earlier one, as `time:checkpoint_wait` says. The checkpoint gets its name
        only after `logged`: until then `state.metrics` may grow. Raises what the earlier save raised, and what keeps
        this one from beginning.
        """
        metrics: dict[str, float] = {}
        with timed(metrics, "time:checkpoint_wait"):
            await self.settle()
        metrics |= self.check()
        self._is_logged = asyncio.Event()
        is_copied = asyncio.Event()
        self._writing = asyncio.create_task(self._write(state, is_copied, self._is_logged))
        await is_copied.wait()
        if self._writing.done():
            self._writing.result()
        return metrics

    def logged(self) -> None:
        """The step that was copied is in metrics.jsonl, on the disk."""
        self._is_logged.set()

    def check(self) -> dict[str, float]:
        """Raise what a save has raised meanwhile. Else what is to be logged of one that has ended, once."""
        if self._writing is not None and self._writing.done():
            self._writing.result()
        times, self._times = self._times, {}
        return times

    async def settle(self) -> Path | None:
        """Wait for the save that goes on, if one does, and raise what it raises. The newest checkpoint."""
        if self._writing is not None:
            self._saved = await self._writing
        return self._saved

    async def _write(self, state: TrainerState, is_copied: asyncio.Event, is_logged: asyncio.Event) -> Path:
        """One checkpoint.

        Consumes: the ranks' state, as it is now. Waits for: the copy, rank 0's thread, and `logged`. Produces: step_N,
        or the Failure that `check` and `settle` raise. Unblocks: whoever waits for the copy.
        """
        times: dict[str, float] = {}
        try:
            with timed(times, "time:checkpoint_write"):
                folder = await self._checkpoints.save(state, partial(self._fill, is_copied, is_logged))
        finally:
            is_copied.set()
        self._times = times
        self.deadline.longest_write = max(self.deadline.longest_write, times["time:checkpoint_write"])
        return folder

    async def _fill(self, is_copied: asyncio.Event, is_logged: asyncio.Event, folder: Path) -> dict[str, str]:
        try:
            self._chat.save(folder / "model")
        except Exception as error:  # nothing more precise comes out of tokenizers where a disk is full
            raise Failure(f"the tokenizer: {error}") from error
        (folder / CONFIG_FILE).write_text(json.dumps(self._config.model_dump(mode="json"), indent=1))
        await self._policy.save(folder)
        is_copied.set()
        digests = await self._policy.written()
        await is_logged.wait()
        return digests

    async def __aenter__(self) -> Saver:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)


class Deadline:
    """One save as late as possible, and before `seconds` after `started`; made when the first step begins."""

    def __init__(self, seconds: float | None, started: float) -> None:
        self._seconds = seconds
        self._started = started
        self._last = time.monotonic()
        self._longest_step = 0.0
        self.longest_write = 0.0

    def is_near(self) -> bool:
        """Whether the step that ends now is the last after which there is time; true once. Asked after every step."""
        now = time.monotonic()
        self._longest_step, self._last = max(self._longest_step, now - self._last), now
        if self._seconds is None or now - self._started + self._longest_step + self.longest_write < self._seconds:
            return False
        self._seconds = None
        return True
