"""What a run has logged for W&B without a network, and its upload by W&B's own program."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slurmkit.errors import Failure, UserError
from slurmkit.processes import end_with_parent

_HEADER = 7
"""Bytes that a .wandb file begins with. The rest comes seconds later, which W&B's own process may not live to see."""


class OfflineRun(NamedTuple):
    """One attempt's."""

    file: Path
    id: str
    """The run in W&B: the same for all attempts."""
    num_bytes: int
    """With the tables and files that go with it."""
    is_empty: bool
    """Killed, with W&B's own process, before that wrote anything."""
    is_uploaded: bool

    @property
    def is_due(self) -> bool:
        """Whether there is something to upload."""
        return not (self.is_empty or self.is_uploaded)


def offline_runs(run: Path) -> list[OfflineRun]:
    """A run directory's, in the order of the attempts. UserError where there are none."""
    found = [
        OfflineRun(
            file,
            file.stem.removeprefix("run-"),
            sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            file.stat().st_size <= _HEADER,
            file.with_suffix(".wandb.synced").exists(),
        )
        for folder in sorted((run / "wandb").glob("offline-run-*"))  # named after the second in which they began
        for file in folder.glob("run-*.wandb")
    ]
    if not found:
        online = any((run / "wandb").glob("run-*"))
        why = "it was logged online" if online else "it did not log to W&B (logger.wandb_enabled)"
        raise UserError(f"{run.name} has nothing offline to upload: {why}")
    return found


def upload(runs: Sequence[OfflineRun], environ: Mapping[str, str] = os.environ) -> None:
    """Upload these, those of one id one after the other. UserError without W&B or a key; Failure names what did not go.

    W&B's program shows its progress itself.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed here, and uploading takes it: slurmkit[train]")
    netrc = environ.get("NETRC") or os.path.expanduser("~/.netrc")
    if not environ.get("WANDB_API_KEY") and not os.path.isfile(netrc):
        raise UserError(
            f"uploading needs a key, and there is neither WANDB_API_KEY nor {netrc}: export it, or run `wandb login`"
        )
    # A process of its own, as nothing here imports W&B; without a terminal to ask for a key that is not accepted.
    words = [sys.executable, "-m", "wandb", "sync", *(str(each.file.parent) for each in runs)]
    code = subprocess.run(words, stdin=subprocess.DEVNULL, env=dict(environ), preexec_fn=end_with_parent).returncode
    # Its exit code is 0 whatever became of the upload.
    left = [each.file.parent.name for each in runs if not each.file.with_suffix(".wandb.synced").exists()]
    if left or code:
        raise Failure(f"not uploaded, see above (wandb sync ended with {code}): {', '.join(left) or 'nothing'}")
