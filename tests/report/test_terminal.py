"""Progress in a terminal, from metrics.jsonl alone."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from slurmkit.report.rows import Tail
from slurmkit.report.terminal import RunProgress, sparkline


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def progress(run_dir: Path, screen: io.StringIO) -> RunProgress:
    return RunProgress(run_dir, Console(file=screen, width=200))


def line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "last_step": 10, **metrics}) + "\n"


def appender(path: Path) -> Callable[[str], None]:
    def append(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    return append


def test_a_validation_is_told_at_once_with_the_latest_reward(tmp_path: Path, screen: io.StringIO) -> None:
    append = appender(tmp_path / "metrics.jsonl")
    with progress(tmp_path, screen) as shown:
        append(line(0, **{"val:accuracy": 0.125}))
        shown.update(tmp_path / "driver.log")
        append(line(1, **{"train:reward_mean": 0.25, "time:step": 7.0}))
        append(line(2, **{"train:reward_mean": 0.375, "time:step": 9.0, "val:accuracy": 0.5}))
        shown.update(tmp_path / "driver.log")
    told = screen.getvalue().splitlines()
    assert told[0] == "step 0/10  accuracy 0.12"
    assert told[1] == "step 2/10  reward 0.38  accuracy 0.50  1:04 left"


def test_last_driver_line_is_shown_without_colors_before_the_first_step(
    tmp_path: Path, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurmkit.report.terminal._LINE_EVERY", 0.0)
    (tmp_path / "driver.log").write_text("first\n\x1b[36m(PolicyWorker pid=7)\x1b[0m loading [bold]\n")
    with progress(tmp_path, screen) as shown:
        shown.update(tmp_path / "driver.log")
    assert screen.getvalue() == "driver.log: (PolicyWorker pid=7) loading [bold]\n"


def test_log_lines_show_at_most_every_10_s_and_never_replace_a_step(
    tmp_path: Path, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("slurmkit.report.terminal.time.monotonic", lambda: now)
    log, metrics = appender(tmp_path / "driver.log"), appender(tmp_path / "metrics.jsonl")
    with progress(tmp_path, screen) as shown:
        for second in range(60):
            now = 100.0 + second
            log(f"step {1 + second // 25}: rollout: {second} of 60 episodes, {second} s\n")
            if second in (25, 50):
                log(f"step {second // 25}/10  reward 0.25\n")
                metrics(line(second // 25, **{"train:reward_mean": 0.25}))
            shown.update(tmp_path / "driver.log")
    told = [text.removeprefix("driver.log: ")[:18] for text in screen.getvalue().splitlines()]
    assert told == [
        *["step 1: rollout: 0", "step 1: rollout: 1", "step 1: rollout: 2"],
        *["step 1/10  reward ", "step 2: rollout: 3", "step 2: rollout: 4"],
        *["step 2/10  reward "],
    ]


def test_a_terminal_shows_the_log_s_last_line_below_the_figures(tmp_path: Path, screen: io.StringIO) -> None:
    console = Console(file=screen, force_terminal=True, width=90, color_system=None)
    log = tmp_path / "driver.log"
    metrics = tmp_path / "metrics.jsonl"
    with RunProgress(tmp_path, console, whole=True) as shown:
        log.write_text("loading the engines: 5 s\n")
        console.print(shown.drawn(log))
        assert "loading the engines: 5 s" in screen.getvalue()
        metrics.write_text(line(1, **{"time:step": 4.0}))
        shown.update(log)
        log.write_text("step 1/10  4.00 s\n")
        console.print(shown.drawn(log))
        assert "4.00 s\n" not in screen.getvalue(), "the figures say it"
        log.write_text("step 1/10  4.00 s\nvalidation after step 1: 12 of 64 episodes, 25 s\n" * 500)
        console.print(shown.drawn(log))
    assert "validation after step 1: 12 of 64 episodes, 25 s" in screen.getvalue()


def test_half_a_line_waits_for_its_end(tmp_path: Path, screen: io.StringIO) -> None:
    append = appender(tmp_path / "metrics.jsonl")
    whole = line(3, **{"val:accuracy": 0.5})
    with progress(tmp_path, screen) as shown:
        append(whole[:10])
        shown.update(tmp_path / "driver.log")
        assert screen.getvalue() == ""
        append(whole[10:])
        shown.update(tmp_path / "driver.log")
    assert "step 3/10" in screen.getvalue()


def test_what_an_earlier_attempt_logged_is_not_progress(tmp_path: Path, screen: io.StringIO) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(0, **{"val:accuracy": 0.1}) + line(9, **{"val:accuracy": 0.9}))
    with progress(tmp_path, screen) as shown:
        shown.update(tmp_path / "driver.log")
        assert screen.getvalue() == ""
        # The next attempt goes on from step 4: it puts a shorter file in this one's place, then appends.
        kept = tmp_path / "kept"
        kept.write_text(line(4, **{"train:reward_mean": 0.1}))
        os.replace(kept, path)
        appender(path)(line(5, **{"val:accuracy": 0.6}))
        shown.update(tmp_path / "driver.log")
    assert "step 5/10  reward 0.10  accuracy 0.60" in screen.getvalue()


FIGURES = [
    line(0, **{"val:accuracy": 0.125}),
    line(1, **{"train:reward_mean": 0.25, "train:reward_std": 0.5, "time:step": 4.0, "time:rollout": 3.0}),
    line(2, **{"train:reward_mean": 0.5, "time:step": 4.0, "time:update": 3.0, "val:accuracy": 0.75}),
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_terminal_shows_curves_phases_and_time_left_in_its_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(FIGURES))
    drawn = io.BytesIO()
    console = Console(file=io.TextIOWrapper(drawn, encoding), force_terminal=True, width=90, color_system=None)
    with RunProgress(tmp_path, console, whole=True) as shown:
        shown.update(tmp_path / "driver.log", "näme: running")
        console.file.flush()
    text = drawn.getvalue().decode(encoding)
    assert "step 2/10  0:32 left" in text
    assert "0.75, 0.12 before" in text
    assert "rollout 1.50 s  update 1.50 s" in text
    assert "4.00 s a step" in text
    if encoding == "utf-8":
        assert "▁█  0.50 ± 0.50" in text
        assert "näme: running" in text
    else:
        assert "0.50 +/- 0.50" in text
        assert "n?me: running" in text


def test_a_curve_is_the_means_of_what_falls_into_each_place() -> None:
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([0, 7, 0, 7, 7, 7], 3) == "▁▁█"
    assert sparkline([3, 3], 9) == "▁▁"
    assert sparkline([], 9) == ""


def test_steps_that_are_made_again_take_the_place_of_those_before_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(FIGURES[1] + FIGURES[2])
    tail = Tail(path, whole=True)
    rows, is_anew = tail.read()
    assert ([row["step"] for row in rows], is_anew) == ([1, 2], False)
    (tmp_path / "beside").write_text(FIGURES[1])
    os.replace(tmp_path / "beside", path)
    rows, is_anew = tail.read()
    assert ([row["step"] for row in rows], is_anew) == ([1], True)
    assert tail.read() == ([], False)
