"""Where the time of an update goes."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch


class Stopwatch:
    """Seconds between marks, added up by name; on a GPU between the marks' turns in its queue, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def mark(self, name: str) -> None:
        """What was done since the mark before is called `name`."""
        self._marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """All of them; waits for the GPU."""
        if self._is_cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            total[name] += start.elapsed_time(end) / 1000 if self._is_cuda else end - start
        return dict(total)
