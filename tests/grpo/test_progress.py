"""What the log says of a phase that takes long."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from slurmkit.grpo import progress
from slurmkit.grpo.progress import Count, Progress, reported


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST", 0.05)
    monkeypatch.setattr(progress, "_EVERY", 0.05)


@pytest.mark.usefixtures("_soon")
def test_a_long_phase_logs_its_episodes_as_they_finish(capsys: pytest.CaptureFixture[str]) -> None:
    count = Count(total=3)

    async def play() -> str:
        for _ in range(3):
            await asyncio.sleep(0.2)
            count.add()
        return "groups"

    assert asyncio.run(reported("step 2: rollout", play(), count)) == "groups"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 2: rollout: 0 of 3 episodes, 0 s"
    assert any("2 of 3" in line for line in lines)


def test_a_short_phase_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(reported("loading", asyncio.sleep(0)))
    assert capsys.readouterr().out == ""


def test_progress_logs_after_5_s_then_every_10_s_and_rarely_if_stalled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    phase = Progress("loading")
    for now, done in ((4, "0"), (6, "1"), (15, "2"), (17, "2"), (28, "2"), (33, "2"), (35, "2"), (44, "3"), (46, "3")):  # noqa: B007
        phase.log(done)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["loading: 1, 6 s", "loading: 2, 17 s", "loading: 2, 35 s", "loading: 3, 46 s"]


@pytest.mark.usefixtures("_soon")
def test_a_failure_is_raised_while_a_phase_is_reported() -> None:
    async def fail() -> None:
        await asyncio.sleep(0.1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(reported("loading", fail()))
