"""Progress of a run in the terminal: drawn anew where that is possible, else in lines.

Read from its metrics.jsonl, and from the last line of the driver's log while a phase takes long.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slurmkit.report.rows import PHASES, Row, Tail

# Not on a terminal: a line of figures for every validation, and one in this many seconds.
_LINE_EVERY = 20.0
# There, at most one of the log's lines in this many seconds.
_LOG_LINE_EVERY = 10.0
# The log's line for a step says what the figures say.
_STEP = re.compile(r"step \d+/\d+  ")
# Bytes at the log's end that hold its last line.
_END = 4096
# Steps whose mean tells the time left and the phases.
_RECENT = 20
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = ("blue", "cyan", "yellow", "magenta", "green", "red", "bright_black")
_WIDTH = 40


class PatientConsole(Console):
    """A console that prints nothing more when the reader of its pipe has left; rich would end this process."""

    def on_broken_pipe(self) -> None:
        """Go on, so that the run does."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunProgress:
    """Call `update` as often as wanted; it reads what was appended since."""

    def __init__(self, run_dir: Path, console: Console, *, whole: bool = False) -> None:
        """`whole`: what earlier attempts logged is shown as well; else that is history, not progress."""
        self._tail = Tail(run_dir / "metrics.jsonl", whole=whole)
        self._console = console
        self._figures = Figures()
        self._text, self._said = "", time.monotonic()
        self._log_line, self._logged = "", -math.inf
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, log: Path, head: str = "") -> None:
        """Show the newest step and the driver's last line; `head` above them where they are drawn."""
        rows, is_anew = self._tail.read()
        self._figures.take(rows, is_anew)
        if self._live is not None:
            self._live.update(self.drawn(log, head), refresh=True)
            return
        now, text, log_line = time.monotonic(), self._figures.line(), _last_line(log)
        is_validation = any("val:accuracy" in row for row in rows)
        if text != self._text and (is_validation or now - self._said > _LINE_EVERY):
            self._text, self._said, self._logged = text, now, now
            self._print(text)
        elif log_line not in ("", self._log_line) and now - self._logged > _LOG_LINE_EVERY:
            self._log_line, self._logged = log_line, now
            self._print(f"{log.name}: {log_line}")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def drawn(self, log: Path, head: str = "") -> RenderableType:
        """What stands on a terminal now."""
        title = [self._words(head, "bold")] if head else []
        log_line = _last_line(log)
        if not self._figures.latest:
            return Group(*title, self._words(log_line or "starting", "dim"))
        figures = self._figures.drawn(self._console.width, is_plain=self._is_plain)
        return Group(*title, figures, *([self._words(log_line, "dim")] if log_line else []))

    @property
    def _is_plain(self) -> bool:
        """Whether the terminal has no more than ASCII."""
        return not self._console.encoding.startswith("utf")

    def _words(self, text: str, style: str) -> Text:
        written = text.encode("ascii", "replace").decode() if self._is_plain else text
        return Text(written, style=style, no_wrap=True, overflow="crop")


class Figures:
    """What is shown of a run's lines."""

    def __init__(self) -> None:
        self.latest: Row = {}
        self._rewards: list[float] = []
        self._accuracies: list[tuple[float, float]] = []
        self._recent: deque[Row] = deque(maxlen=_RECENT)

    def take(self, rows: Sequence[Row], is_anew: bool) -> None:
        """Add lines; `is_anew`: they stand in the place of all before them."""
        if is_anew:
            self.__init__()  # type: ignore[misc]
        for row in rows:
            self.latest.update(row)
            if "train:reward_mean" in row:
                self._rewards.append(row["train:reward_mean"])
            if "val:accuracy" in row:
                self._accuracies.append((row["step"], row["val:accuracy"]))
            if "time:step" in row:
                self._recent.append(row)

    @property
    def left(self) -> float | None:
        """Seconds until the last step, at the mean of the last ones."""
        if not self._recent or "last_step" not in self.latest:
            return None
        mean = sum(row["time:step"] for row in self._recent) / len(self._recent)
        return mean * max(0.0, self.latest["last_step"] - self.latest["step"])

    def line(self) -> str:
        """All of it in one line, "" before the first step."""
        if not self.latest:
            return ""
        parts = [self._step()]
        for name, label in (("train:reward_mean", "reward"), ("val:accuracy", "accuracy")):
            if name in self.latest:
                parts.append(f"{label} {self.latest[name]:.2f}")
        return "  ".join([*parts, *self._left()])

    def drawn(self, width: int, *, is_plain: bool) -> Table:
        """As a few rows of a terminal of that width; `is_plain`: one that has no more than ASCII."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True, min_width=len("accuracy"))
        table.add_column()
        room = max(8, min(_WIDTH, width - 30))
        bar = ProgressBar(total=self.latest.get("last_step", 1), completed=self.latest["step"], width=room)
        bar.complete_style = bar.finished_style = "green"
        beside = Table.grid(padding=(0, 2, 0, 0))
        beside.add_row(bar, Text("  ".join([self._step(), *self._left()])))
        table.add_row("step", beside)
        if self._rewards:
            sign = "+/-" if is_plain else "±"
            spread = f" {sign} {self.latest['train:reward_std']:.2f}" if "train:reward_std" in self.latest else ""
            table.add_row("reward", self._told(f"{self._rewards[-1]:.2f}{spread}", self._rewards, room, is_plain))
        if self._accuracies:
            first_step, before = self._accuracies[0]
            since = f", {before:.2f} before" if first_step == 0 and len(self._accuracies) > 1 else ""
            values = [value for _, value in self._accuracies]
            table.add_row("accuracy", self._told(f"{values[-1]:.2f}{since}", values, room, is_plain))
        if self._recent:
            bar_of_phases, words = self._phases(room, "#" if is_plain else "█")
            table.add_row("time", bar_of_phases)
            table.add_row("", words)
        return table

    def _told(self, value: str, values: Sequence[float], room: int, is_plain: bool) -> Text:
        curve = "" if is_plain else sparkline(values, room)
        return Text.assemble((f"{curve:<{min(room, len(curve))}}", "green"), "  " if curve else "", value)

    def _phases(self, room: int, block: str) -> tuple[Text, Text]:
        """The phases of the last steps as one bar, and in words."""
        count = len(self._recent)
        seconds = {each: sum(row.get(f"time:{each}", 0.0) for row in self._recent) / count for each in PHASES}
        shown = [(name, value, colour) for (name, value), colour in zip(seconds.items(), _COLOURS, strict=True)]
        total = sum(max(0.0, value) for value in seconds.values()) or 1.0
        whole = Text.assemble(
            *((block * round(max(0.0, value) / total * room), colour) for _, value, colour in shown),
            f"  {sum(row['time:step'] for row in self._recent) / count:.2f} s a step",
        )
        words = Text("  ").join(
            Text(f"{name} {value:.2f} s", style=colour) for name, value, colour in shown if value >= 0.005
        )
        return whole, words

    def _step(self) -> str:
        return f"step {self.latest['step']:.0f}" + (
            f"/{self.latest['last_step']:.0f}" if "last_step" in self.latest else ""
        )

    def _left(self) -> Iterator[str]:
        if (left := self.left) is not None:
            yield f"{int(left // 60)}:{int(left % 60):02d} left"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values from left to right in at most `width` characters, each the mean of those in its place.

    Example: sparkline([0, 1, 2, 3], 4) == "▁▃▆█".
    """
    count = min(width, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / (high - low) * steps) if high > low else 0] for mean in means)


def _last_line(log: Path) -> str:
    """Return the log's last line without its colours, "" if it is that of a step."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    line = Text.from_ansi(lines[-1]).plain if lines else ""
    return "" if _STEP.match(line) else line
