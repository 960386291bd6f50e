"""Where a run's logs are: in its run directory, or in logger.log_dir with links from the run directory.

Everything that reads a run's logs reads them in the run directory, so it finds them in either case.
"""

from __future__ import annotations

import os
from pathlib import Path

METRICS = "metrics.jsonl"
FOLDERS = ("plots", "samples", "validation", "wandb", "tensorboard")


def problem_with(run_directory: Path, log_dir: Path) -> str | None:
    """Return why this run cannot log there, None if it can. A run's logs stay where its first attempt put them."""
    wanted, own = log_dir.resolve(), run_directory / METRICS
    if os.path.lexists(own):
        present = own.resolve().parent
        if present != wanted:
            return f"the logs of this run are in {present}: set it to that folder, or leave it out"
    elif wanted != run_directory.resolve() and (wanted / METRICS).exists():
        return f"it holds {METRICS} of another run: give each run a folder of its own"
    return None


def link_logs(run_directory: Path, log_dir: Path) -> None:
    """Make the folders in `log_dir`, and links to them and to metrics.jsonl in the run directory. Idempotent."""
    target = log_dir.resolve()
    if target == run_directory.resolve():
        return
    for name in (METRICS, *FOLDERS):
        if name in FOLDERS:
            (target / name).mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(run_directory / name):
            (run_directory / name).symlink_to(target / name)
