"""A full file system under the keeper: a real one, of two megabytes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from slurmkit.keeper import stand_in, watch
from slurmkit.keeper.chain import Limits, begin
from slurmkit.keeper.judge import judge
from slurmkit.keeper.meeting import Meeting
from slurmkit.keeper.node import Node
from slurmkit.keeper.stand_in import StandIn
from slurmkit.keeper.watch import Watch
from tests.support.attempts import attempt, followed

ONCE = Limits(until_done=False, max_attempts=None, max_hours=None, trains=False)
FOR_EVER = ONCE._replace(until_done=True)
Fill = Callable[[], Path]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory on a file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    for name in list(os.environ):
        if name.startswith(("SK_", "SLURM")):
            monkeypatch.delenv(name)
    path = tmp_path / "run"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=100", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def fill(run: Path) -> Fill:
    def fill() -> Path:
        path = run / "full"
        block = b"x" * 4096
        with suppress(OSError), path.open("wb", buffering=0) as file:
            while file.write(block):
                pass
        return path

    return fill


def begun(run: Path, monkeypatch: pytest.MonkeyPatch) -> Meeting:
    meeting = attempt(run, monkeypatch, "7")
    begin(meeting, ONCE)
    meeting.publish("srun", "1")
    meeting.publish("started", "1")
    return meeting


def test_a_full_file_system_is_no_sign_of_a_dead_node(run: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT", 0.0)
    monkeypatch.setattr(watch.os, "kill", lambda *_: None)
    meeting = begun(run, monkeypatch)
    meeting.publish("alive.1", "node2 5")
    keeper = Watch(meeting, ONCE, None, "")
    full = fill()
    for _ in range(30):
        keeper.look()
    full.unlink()
    keeper.look()
    assert meeting.of("lost") == {}, "the node has not yet had the time for a sign of life"
    for _ in range(30):
        keeper.look()
    assert meeting.of("lost") == {"1": "node2"}


def test_a_node_on_a_full_file_system_keeps_beating_and_blames_nobody(
    run: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setattr(stand_in, "TRAINING", 1)
    monkeypatch.setattr("slurmkit.keeper.node.BEAT", 0.0)
    meeting = begun(run, monkeypatch)
    meeting.publish("alive.0", "node1 5")
    meeting.publish("watching", "5")
    part = Node(meeting, StandIn(meeting, ONCE, ""))
    fill()
    looks = iter([*[False] * 5, True])
    monkeypatch.setattr("slurmkit.keeper.node.time.sleep", lambda _: part._leave() if next(looks) else None)
    part.run()
    assert meeting.of("lost") == {}


@pytest.mark.parametrize("published", [{}, {"exit_code": "1"}])
def test_the_end_is_recorded_on_a_full_file_system_and_says_so(
    run: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch, published: dict[str, str]
) -> None:
    meeting = begun(run, monkeypatch)
    for name, text in published.items():
        meeting.publish(name, text)
    fill()
    code = Watch(meeting, ONCE, None, "").conclude()
    end = json.loads(Path(meeting.folder, "end.json").read_text())
    assert end["code"] == code == int(published.get("exit_code", "75"))
    assert f"no space left on {run} (No space left on device)" in end["reason"]
    assert meeting.text("code") == str(code)
    assert list(Path(meeting.folder).glob(".*")) == []


def test_a_run_on_a_full_file_system_does_not_go_on(run: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = begun(run, monkeypatch)
    fill()
    keeper = Watch(meeting, ONCE, None, "")
    keeper._chain.limits = FOR_EVER
    keeper.conclude()
    end = json.loads(Path(meeting.folder, "end.json").read_text())
    assert end["goes_on"] is False
    assert end["reason"].endswith("free some space and submit it again to resume")


def test_an_attempt_does_not_begin_on_a_full_file_system(
    run: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = followed(begun(run, monkeypatch), monkeypatch, {}, {})
    fill()
    begin(second, FOR_EVER)
    out, err = capsys.readouterr()
    assert out == "75\n"
    assert f"slurmkit: no space left on {run}" in err


def test_an_attempt_without_room_for_its_folder_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = followed(begun(run, monkeypatch), monkeypatch, {}, {})
    os.rmdir(second.meet)
    with suppress(OSError):
        for number in range(100):
            (run / f"file{number}").touch()
    begin(second, FOR_EVER)
    out, err = capsys.readouterr()
    assert out == "75\n"
    assert f"slurmkit: no space left on {run}" in err


def test_a_moment_without_space_is_not_in_the_record_of_a_success(
    run: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = begun(run, monkeypatch)
    full = fill()
    assert not meeting.publish("watching", "1")
    full.unlink()
    meeting.publish("exit_code", "0")
    assert judge(meeting, "", False).reason == "the command is done"
