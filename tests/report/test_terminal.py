"""Progress in a terminal, from metrics.jsonl alone."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from slurmkit.report.terminal import RunProgress


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


def test_before_the_first_step_the_driver_s_last_line_is_shown_without_its_colours(
    tmp_path: Path, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurmkit.report.terminal._LINE_EVERY", 0.0)
    (tmp_path / "driver.log").write_text("first\n\x1b[36m(PolicyWorker pid=7)\x1b[0m loading [bold]\n")
    with progress(tmp_path, screen) as shown:
        shown.update(tmp_path / "driver.log")
    assert screen.getvalue() == "(PolicyWorker pid=7) loading [bold]\n"


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
