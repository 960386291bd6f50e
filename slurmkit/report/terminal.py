"""Progress of a run in the terminal, read from its metrics.jsonl: a bar where it can move, lines where it cannot."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

# Not on a terminal: a line for every validation, and at least one in this many seconds.
_LINE_EVERY = 20.0


class RunProgress:
    """Call `update` as often as wanted; it reads what was appended since."""

    def __init__(self, run_dir: Path, console: Console) -> None:
        self._metrics = run_dir / "metrics.jsonl"
        # An earlier attempt's lines are history, not progress.
        self._inode, self._offset = self._identify()
        self._console = console
        self._first: tuple[int, float] | None = None
        self._latest: dict[str, Any] = {}
        self._text, self._said = "", time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, facts="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, log: Path) -> None:
        """Show the newest step, or before the first one the driver's last line."""
        rows = self._read_new_rows()
        for row in rows:
            self._latest.update(row)
        if rows and self._first is None:
            self._first = (int(rows[-1]["step"]), time.monotonic())
        if not self._latest:
            self._say(_last_line(log), force=False)
            return
        facts = self._facts()
        step, last = self._latest["step"], self._latest["last_step"]
        self._bar.update(self._task, completed=step, total=last, description="training", facts=facts)
        self._say(facts, force=any("val:accuracy" in row for row in rows))

    def _facts(self) -> str:
        step, last = int(self._latest["step"]), int(self._latest["last_step"])
        parts = [f"step {step}/{last}"]
        for name, label in (("train:reward_mean", "reward"), ("val:accuracy", "accuracy")):
            if self._latest.get(name) is not None:
                parts.append(f"{label} {self._latest[name]:.2f}")
        assert self._first is not None
        first_step, started = self._first
        if step > first_step:
            left = (time.monotonic() - started) / (step - first_step) * (last - step)
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        return "  ".join(parts)

    def _say(self, text: str, force: bool) -> None:
        if self._console.is_terminal:
            if not self._latest:
                self._bar.update(self._task, facts=text[:80])
        elif text != self._text and (force or time.monotonic() - self._said > _LINE_EVERY):
            self._text, self._said = text, time.monotonic()
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _identify(self) -> tuple[int, int]:
        try:
            status = self._metrics.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_size

    def _read_new_rows(self) -> list[dict[str, Any]]:
        inode, size = self._identify()
        if inode != self._inode or size < self._offset:
            # A resumed run begins by taking back the lines after its checkpoint.
            self._inode, self._offset = inode, 0
        if size == self._offset:
            return []
        with self._metrics.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return Text.from_ansi(lines[-1]).plain if lines else ""
