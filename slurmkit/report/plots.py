"""Plots of a run, from nothing but its metrics.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

import matplotlib

from slurmkit.errors import UserError

matplotlib.use("Agg")

from matplotlib import pyplot

# Okabe and Ito 2008: told apart with every kind of colour vision, and in grey by their lightness.
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#555555"


def draw_validation_reward(run_directory: Path) -> Path:
    """Write plots/validation_reward.png: validation accuracy and mean training reward over steps.

    The accuracy before the first step is marked as the baseline. UserError where there is nothing to draw.
    """
    lines = _read(run_directory / "metrics.jsonl")
    accuracy = [(line["step"], line["val:accuracy"]) for line in lines if "val:accuracy" in line]
    reward = [(line["step"], line["train:reward_mean"]) for line in lines if "train:reward_mean" in line]
    if not accuracy and not reward:
        raise UserError(f"{run_directory / 'metrics.jsonl'} holds neither val:accuracy nor train:reward_mean")

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if reward:
        axes.plot(*zip(*reward, strict=True), color=_ORANGE, linewidth=1, label="mean reward, training")
    if accuracy:
        axes.plot(*zip(*accuracy, strict=True), color=_BLUE, linewidth=2, marker="o", label="accuracy, validation")
        if accuracy[0][0] == 0:
            baseline = accuracy[0][1]
            axes.axhline(baseline, color=_GREY, linestyle="--", label=f"before training: {baseline:.2f}")
        last_step, last = accuracy[-1]
        axes.annotate(f"{last:.2f}", (last_step, last), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set(xlabel="step", ylabel="accuracy, reward", title=run_directory.absolute().name)
    values = [value for _, value in accuracy + reward]
    # Room above for the last figure.
    axes.set_ylim(min(0.0, *values), 1.1 * max(0.1, *values))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")

    plot = run_directory / "plots" / "validation_reward.png"
    plot.parent.mkdir(exist_ok=True)
    unfinished = plot.with_name(f".{plot.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=120)
    pyplot.close(figure)
    os.replace(unfinished, plot)
    return plot


def _read(path: Path) -> list[dict[str, float]]:
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    # A run writes whole lines; one without its end is still being written.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
