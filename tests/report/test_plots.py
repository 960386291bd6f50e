"""The plot, from nothing but metrics.jsonl."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slurmkit.errors import UserError
from slurmkit.report.plots import draw_validation_reward


def write(folder: Path, *lines: dict[str, Any], tail: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def test_a_running_runs_plot_is_drawn_from_the_lines_that_are_whole(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"step": 0, "val:accuracy": 0.1},
        {"step": 1, "train:reward_mean": 0.2},
        {"step": 2, "train:reward_mean": 0.4, "val:accuracy": 0.5},
        tail='{"step": 3, "train:rew',
    )
    plot = draw_validation_reward(tmp_path)
    assert plot == tmp_path / "plots" / "validation_reward.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in plot.parent.iterdir()] == ["validation_reward.png"]


@pytest.mark.parametrize("line", [{"step": 0, "val:accuracy": 0.1}, {"step": 1, "train:reward_mean": -2.0}])
def test_one_figure_is_enough_for_a_plot(tmp_path: Path, line: dict[str, Any]) -> None:
    assert draw_validation_reward(write(tmp_path, line)).exists()


def test_a_run_with_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither val:accuracy nor train:reward_mean"):
        draw_validation_reward(write(tmp_path, {"step": 1, "time:step": 3.0}))


def test_the_command_names_a_directory_that_is_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slurmkit.report", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/none/metrics.jsonl: cannot be read: No such file or directory\n"
