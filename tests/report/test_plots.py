"""The plots, from nothing but metrics.jsonl."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes

from slurmkit.errors import UserError
from slurmkit.report.plots import draw_plots


def write(folder: Path, *lines: dict[str, Any], tail: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


RUN = [
    {"step": 0, "val:accuracy": 0.1, "val:reward_mean": 0.125},
    {
        "step": 1,
        **{"train:reward_mean": 0.5, "train:reward_std": 0.25, "train:loss": 0.01, "train:entropy": 1.5},
        **{"train:approx_kl": 0.001, "train:completion_tokens_mean": 12, "perf:tokens_per_sec_per_gpu": 1500},
        **{"time:step": 3.0, "time:rollout": 2.0, "time:update": 1.25, "time:other": -0.25},
    },
    {"step": 2, "train:reward_mean": 0.75, "train:reward_std": 0.5, "time:step": 4.0, "time:rollout": 4.0},
]


@pytest.fixture(scope="module")
def panels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Axes]]:
    """The panels of training.png by their titles, as they were drawn."""
    with pytest.MonkeyPatch.context() as kept:
        kept.setattr(pyplot, "close", lambda figure: None)
        draw_plots(write(tmp_path_factory.mktemp("run"), *RUN))
    yield {axes.get_title(): axes for axes in pyplot.gcf().axes}
    pyplot.close("all")


def test_a_running_runs_plots_are_drawn_from_the_lines_that_are_whole(tmp_path: Path) -> None:
    plots = draw_plots(write(tmp_path, *RUN, tail='{"step": 3, "train:rew'))
    assert plots == [tmp_path / "plots/validation_reward.png", tmp_path / "plots/training.png"]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"validation_reward.png", "training.png"}


def test_every_panel_has_its_unit_and_counts_steps(panels: dict[str, Axes]) -> None:
    units = {title: axes.get_ylabel() for title, axes in panels.items()}
    assert units == {
        "Reward": "reward",
        "Accuracy": "part of the episodes",
        "Loss": "loss",
        "KL": "nats",
        "Entropy": "nats",
        "Lengths": "tokens",
        "Speed, per GPU": "tokens/s",
        "Time per step": "seconds",
    }
    assert {axes.get_xlabel() for axes in panels.values()} == {"step"}


def test_reward_plot_has_its_spread_and_the_untrained_model_as_baseline(panels: dict[str, Axes]) -> None:
    (band,) = panels["Reward"].collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices}
    assert {(1, 0.25), (1, 0.75), (2, 0.25), (2, 1.25)} <= corners
    assert {line.get_label() for line in panels["Reward"].lines} >= {"before training: 0.12"}
    assert {line.get_label() for line in panels["Accuracy"].lines} >= {"before training: 0.10"}


def test_step_phases_are_stacked_and_phases_without_time_are_omitted(panels: dict[str, Axes]) -> None:
    drawn = panels["Time per step"]
    assert drawn.get_legend_handles_labels()[1] == ["rollout", "update"]
    assert max(y for x, y in drawn.collections[1].get_paths()[0].vertices if x == 1) == 3.25


@pytest.mark.parametrize("line", [{"step": 0, "val:accuracy": 0.1}, {"step": 1, "train:reward_mean": -2.0}])
def test_one_figure_is_enough_for_a_plot(tmp_path: Path, line: dict[str, Any]) -> None:
    assert draw_plots(write(tmp_path, line))[0].exists()


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / r"a $\frac{ b"
    folder.mkdir()
    assert len(draw_plots(write(folder, *RUN))) == 2
    assert matplotlib.get_backend().lower() == "agg"


def test_a_line_that_is_no_step_s_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path, RUN[0], tail='\x00garbage\n[1]\n{"step": 1, "train:reward_mean": NaN, "train:loss": 0.1}\n')
    assert draw_plots(tmp_path) == [tmp_path / "plots/validation_reward.png"]


def test_a_run_with_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither val:accuracy nor train:reward_mean"):
        draw_plots(write(tmp_path, {"step": 1, "time:step": 3.0}))


def test_the_command_names_a_directory_that_is_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slurmkit.report", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/none/metrics.jsonl: cannot be read: No such file or directory\n"
