"""When a run's plots are drawn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from slurmkit.grpo import plots


def test_plots_are_drawn_at_most_every_30_s_and_once_more_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, drawn = [1000.0], list[float]()

    async def draw(self: plots.Plots) -> None:
        drawn.append(now[0])

    monkeypatch.setattr(plots.Plots, "_draw", draw)
    monkeypatch.setattr(plots, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def redraw_every_ten_seconds() -> None:
        async with plots.Plots(tmp_path) as drawings:
            for _ in range(7):
                drawings.redraw()
                await asyncio.sleep(0)
                now[0] += 10

    asyncio.run(redraw_every_ten_seconds())
    assert drawn == [1000.0, 1030.0, 1060.0, 1070.0]
