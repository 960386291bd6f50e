"""Plots of a run, from nothing but its metrics.jsonl."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from slurmkit.errors import UserError
from slurmkit.report.rows import PHASES, Rows, read_rows

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

# Okabe and Ito 2008: told apart with every kind of colour vision, and in grey by their lightness.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#555555"
_OF_PHASES = (_BLUE, "#56B4E9", _ORANGE, "#F0E442", _GREEN, _PURPLE, "#BBBBBB")

# Of training.png's plain panels: title, unit, and what is drawn, name and label.
_PANELS = (
    ("Loss", "loss", (("train:loss", "loss"),)),
    (
        "KL",
        "nats",
        (
            ("train:approx_kl", "of the update"),
            ("train:gen_kl_error", "engine and trainer"),
            ("train:kl_penalty", "from the reference"),
        ),
    ),
    ("Entropy", "nats", (("train:entropy", "of the next token"),)),
    (
        "Lengths",
        "tokens",
        (
            ("train:completion_tokens_mean", "completion, mean"),
            ("train:completion_tokens_max", "completion, longest"),
            ("train:prompt_tokens_mean", "prompt, mean"),
        ),
    ),
    (
        "Speed, per GPU",
        "tokens/s",
        (
            ("perf:tokens_per_sec_per_gpu", "whole step"),
            ("perf:generation_tokens_per_sec_per_gpu", "generation"),
            ("perf:policy_training_tokens_per_sec_per_gpu", "update"),
        ),
    ),
)


def draw_plots(run_directory: Path) -> list[Path]:
    """Write plots/validation_reward.png, and once there was a step of training plots/training.png.

    UserError where there is nothing to draw.
    """
    rows = read_rows(run_directory)
    accuracy, reward = rows.points("val:accuracy"), rows.points("train:reward_mean")
    if not accuracy and not reward:
        raise UserError(f"{run_directory / 'metrics.jsonl'} holds neither val:accuracy nor train:reward_mean")
    folder, name = run_directory / "plots", run_directory.absolute().name
    folder.mkdir(exist_ok=True)

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    _draw_learning(axes, rows)
    axes.set(ylabel="accuracy (0 to 1), reward")
    axes.set_title(name, parse_math=False)
    plots = [_save(figure, folder / "validation_reward.png")]
    if reward:
        plots.append(_save(_training(rows, name), folder / "training.png"))
    return plots


def _training(rows: Rows, name: str) -> Figure:
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8.5), layout="constrained")
    figure.suptitle(name, parse_math=False)
    _draw_reward(axes.flat[0], rows)
    _draw_learning(axes.flat[1], rows, with_reward=False)
    for panel, (title, unit, lines) in zip(axes.flat[2:7], _PANELS, strict=True):
        panel.set(title=title, ylabel=unit)
        _draw_lines(panel, rows, lines)
        if unit == "tokens/s":
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
            panel.set_ylim(bottom=0)
    _draw_phases(axes.flat[7], rows)
    return figure


def _draw_learning(axes: Axes, rows: Rows, *, with_reward: bool = True) -> None:
    """Accuracy over steps; the one before the first step is marked as the baseline."""
    accuracy = rows.points("val:accuracy")
    other = rows.points("train:reward_mean" if with_reward else "train:accuracy")
    if other:
        label = "mean reward, training" if with_reward else "training"
        axes.plot(*zip(*other, strict=True), color=_ORANGE, linewidth=1, label=label)
    if accuracy:
        label = "accuracy, validation" if with_reward else "validation"
        axes.plot(*zip(*accuracy, strict=True), color=_BLUE, linewidth=2, marker="o", markersize=4, label=label)
        if accuracy[0][0] == 0:
            _mark_baseline(axes, accuracy[0][1])
        last_step, last = accuracy[-1]
        axes.annotate(f"{last:.2f}", (last_step, last), xytext=(0, 8), textcoords="offset points", ha="center")
    values = [value for _, value in accuracy + other] or [0.0]
    # Room above for the last figure.
    axes.set_ylim(min(0.0, *values), 1.1 * max(0.1, *values))
    axes.set(title="Accuracy", ylabel="part of the episodes")
    _finish(axes)


def _draw_reward(axes: Axes, rows: Rows) -> None:
    """Mean reward of training and the band of one standard deviation of the episodes around it."""
    reward = rows.points("train:reward_mean")
    axes.plot(*zip(*reward, strict=True), color=_ORANGE, label="training, mean")
    spread = [row for row in rows.rows if "train:reward_mean" in row and "train:reward_std" in row]
    if spread:
        low = [row["train:reward_mean"] - row["train:reward_std"] for row in spread]
        high = [row["train:reward_mean"] + row["train:reward_std"] for row in spread]
        steps = [row["step"] for row in spread]
        axes.fill_between(steps, low, high, color=_ORANGE, alpha=0.2, linewidth=0, label="± standard deviation")
    validation = rows.points("val:reward_mean")
    if validation:
        axes.plot(*zip(*validation, strict=True), color=_BLUE, marker="o", markersize=4, label="validation, mean")
        if validation[0][0] == 0:
            _mark_baseline(axes, validation[0][1])
    axes.set(title="Reward", ylabel="reward")
    _finish(axes)


def _draw_lines(axes: Axes, rows: Rows, lines: Sequence[tuple[str, str]]) -> None:
    # Dashed over solid, so that one which hides another shows it.
    for (name, label), colour, dashes in zip(lines, (_BLUE, _ORANGE, _GREEN), ("-", "--", ":"), strict=False):
        if points := rows.points(name):
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.4, label=label)
    _finish(axes)


def _draw_phases(axes: Axes, rows: Rows) -> None:
    """The seconds of a step, one phase above the other."""
    whole = [row for row in rows.rows if "time:step" in row]
    steps = [row["step"] for row in whole]
    # The rest can be less than nothing by the clock's grain.
    times = {phase: [max(0.0, row.get(f"time:{phase}", 0.0)) for row in whole] for phase in PHASES}
    shown = {
        phase: (each, colour) for (phase, each), colour in zip(times.items(), _OF_PHASES, strict=True) if any(each)
    }
    if shown:
        colours = [colour for _, colour in shown.values()]
        axes.stackplot(steps, [each for each, _ in shown.values()], labels=list(shown), colors=colours, linewidth=0)
    axes.set(title="Time per step", ylabel="seconds")
    axes.margins(x=0, y=0.35)  # room above for the legend
    _finish(axes, num_columns=3)


def _mark_baseline(axes: Axes, value: float) -> None:
    axes.axhline(value, color=_GREY, linestyle="--", linewidth=1, label=f"before training: {value:.2f}")


def _finish(axes: Axes, num_columns: int = 1) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best" if num_columns == 1 else "upper center", fontsize="small", ncols=num_columns)


def _save(figure: Figure, plot: Path) -> Path:
    unfinished = plot.with_name(f".{plot.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=120)
    pyplot.close(figure)
    os.replace(unfinished, plot)
    return plot
