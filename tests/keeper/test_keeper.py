"""The keeper's judgement, from files as nodes leave them and from Slurm's words; tests/faults has it in real jobs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slurmkit.errors import UserError
from slurmkit.job.keeper_file import digest_of_keeper, keeper_text, name_of_keeper
from slurmkit.keeper import watch
from slurmkit.keeper.chain import Chain, Limits, begin
from slurmkit.keeper.judge import judge, may_go_on, why_slurm_ends_it
from slurmkit.keeper.meeting import Meeting
from slurmkit.keeper.node import Node
from slurmkit.run.submit import keeper_for
from tests.support.attempts import attempt, checkpoint, followed, meeting

__all__ = ["meeting"]  # a fixture
FOR_EVER = Limits(until_done=True, max_attempts=None, max_hours=None, trains=True)


@pytest.mark.parametrize("text", ["fast", "0", "nan", "61"])
def test_a_heartbeat_that_is_no_number_of_seconds_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keeper.py").write_text(keeper_text())
    environment = {**os.environ, "SLURMKIT_HEARTBEAT": text}
    done = subprocess.run(
        [sys.executable, tmp_path / "keeper.py", "begin"], env=environment, capture_output=True, text=True, timeout=60
    )
    expected = f"error: SLURMKIT_HEARTBEAT={text} is not a number of seconds above 0 and up to 60\n"
    assert (done.returncode, done.stderr) == (1, expected)


LOST = {"failed.node2": "no sign of life for 20 s", "bad.node2": "no sign of life for 20 s"}


@pytest.mark.parametrize(
    ("facts", "log", "why", "is_cancelled", "expected"),
    [
        ({"exit_code": "0"}, "", "", False, (0, "the command is done", [])),
        ({"exit_code": "0"}, "", "it was cancelled", True, (0, "the command is done", [])),
        ({"exit_code": "7"}, "", "", False, (7, "the command failed with exit code 7", [])),
        (
            {"exit_code": "75"}, "step 1\nerror: policy rank 1 on node 10.0.0.2 is gone\nbye", "", False,
            (75, "the command failed with exit code 75; policy rank 1 on node 10.0.0.2 is gone", []),
        ),
        (
            {"exit_code": "75", **LOST}, "", "", False,
            (75, "the command failed with exit code 75; node node2: no sign of life for 20 s", ["node2"]),
        ),
        (
            {"exit_code": "85", "sent.USR2": ""}, "", "", False,
            (85, "interrupted: its time limit or a preemption is near (USR2); the command saved and left in order", []),
        ),
        (
            {"exit_code": "85"}, "", "it is preempted", False,
            (85, "interrupted: it is preempted; the command saved and left in order", []),
        ),
        ({"exit_code": "85"}, "", "it was cancelled", True, (143, "ended by Slurm: it was cancelled", [])),
        ({}, "", "it has reached its time limit", False, (143, "ended by Slurm: it has reached its time limit", [])),
        ({"exit_code": "140"}, "", "it is preempted", False, (143, "ended by Slurm: it is preempted", [])),
        ({"exit_code": "140"}, "", "", False, (140, "the command failed with exit code 140", [])),
        (LOST, "", "", False, (75, "node node2: no sign of life for 20 s", ["node2"])),
        # A command fails by itself, or because of a node that is lost.
        (
            {"exit_code": "1", **LOST}, "ray.exceptions.ActorDiedError: x", "", False,
            (75, "the command failed with exit code 1; node node2: no sign of life for 20 s", ["node2"]),
        ),
        (
            {"exit_code": "1"}, "", "Slurm ends it, as a node is down", False,
            (75, "the command failed with exit code 1; Slurm ends it, as a node is down", []),
        ),
        # A node whose memory was too small has no fault, and a driver that fails because of memory may go on elsewhere.
        ({**LOST, "killed.node2": "a process was killed"}, "", "", False,
         (75, "node node2: a process was killed; node node2: no sign of life for 20 s", [])),
        ({"exit_code": "1", "killed.node2": "limit 1 MiB"}, "ray.exceptions.OutOfMemoryError: x", "", False,
         (75, "node node2: limit 1 MiB; the command failed with exit code 1", [])),
        ({"exit_code": "1", "killed.node2": "limit 1 MiB"}, "KeyError: x", "", False,
         (1, "node node2: limit 1 MiB; the command failed with exit code 1", [])),
        # Whoever writes its stacks dies of it.
        ({"exit_code": "134", "failed.watchdog": "no progress"}, "", "", False, (75, "no progress", [])),
        ({}, "", "", False, (75, "the command did not finish (srun ended with 1)", [])),
    ],
)  # fmt: skip
def test_what_ended_an_attempt_is_said_from_what_its_nodes_left(
    meeting: Meeting, facts: dict[str, str], log: str, why: str, is_cancelled: bool, expected: tuple[Any, ...]
) -> None:
    for name, text in {"over": "75 srun ended with 1", **facts}.items():
        meeting.publish(name, text)
    Path(meeting.folder, "driver.log").write_text(log)
    verdict = judge(meeting, why, is_cancelled)
    assert (verdict.code, verdict.reason, verdict.bad_nodes) == expected


def test_script_that_ends_before_its_job_step_keeps_its_code_and_reason(meeting: Meeting) -> None:
    os.remove(Path(meeting.meet, "srun"))
    meeting.publish("over", "78 the secret X is not in this job's environment")
    assert judge(meeting, "", False)[:2] == (78, "the secret X is not in this job's environment")
    meeting.publish("over", "3")
    assert judge(meeting, "", False)[:2] == (3, "the job's script ended with exit code 3")


@pytest.mark.parametrize(
    ("state", "reason", "preempted", "words", "is_cancelled"),
    [
        ("COMPLETING", "TimeLimit", "N/A", "time limit", False),
        ("COMPLETING", "None", "2026-11-22T10:00:00", "preempted", False),
        ("RUNNING", "None", "2026-11-22T10:00:00", "preempted", False),
        ("COMPLETING", "NodeDown", "N/A", "a node is down", False),
        ("NODE_FAIL", "None", "N/A", "a node is down", False),
        ("COMPLETING", "None", "N/A", "cancelled", True),
        ("CANCELLED", "None", "N/A", "cancelled", True),
        ("RUNNING", "None", "N/A", "it got SIGTERM, and squeue shows the job as RUNNING", False),
        ("", "", "", "squeue gives no answer", False),
    ],
)
def test_slurm_s_reason_to_end_a_job_is_told_apart(
    state: str, reason: str, preempted: str, words: str, is_cancelled: bool
) -> None:
    said, cancelled = why_slurm_ends_it(state, reason, preempted)
    assert words in said
    assert cancelled is is_cancelled


def test_a_run_goes_on_after_what_may_work_the_next_time_only() -> None:
    assert [code for code in (0, 1, 2, 75, 78, 85, 137, 143) if may_go_on(code)] == [75, 85, 137, 143]


def test_attempts_are_counted_along_the_chain(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = followed(meeting, monkeypatch, {"run_started": 1000}, None)
    begin(second, FOR_EVER)
    assert capsys.readouterr().out == ""
    start = json.loads(Path(second.folder, "start.json").read_text())
    found = {key: start[key] for key in ("attempt", "previous", "run_started", "restart", "nodes", "failures")}
    assert found == {
        **{"attempt": 5, "previous": "7", "run_started": 1000, "restart": 0, "nodes": "node[1-2]"},
        "failures": 1,  # killed hard, without a newer checkpoint
    }


def test_a_job_that_follows_one_of_another_run_begins_a_chain_of_its_own(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SK_PREVIOUS", "6")
    chain = Chain(meeting, FOR_EVER, 5.0)
    assert (chain.number, chain.previous, chain.began) == (1, None, 5.0)


def test_follow_up_of_an_ended_run_does_nothing_and_writes_nothing(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = followed(meeting, monkeypatch, {}, {"goes_on": False})
    begin(second, FOR_EVER)
    out, err = capsys.readouterr()
    assert out == "0\n"
    assert "job 7 ended the run" in err
    assert os.listdir(second.folder) == ["bringup"]


def test_follow_up_after_max_hours_ends_with_the_previous_attempts_code(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = followed(meeting, monkeypatch, {"run_started": time.time() - 3700}, {"code": 85})
    begin(second, FOR_EVER._replace(max_hours=1.0))
    assert capsys.readouterr().out == "85\n"
    end = json.loads(Path(second.folder, "end.json").read_text())
    assert (end["code"], end["goes_on"], end["reason"]) == (85, False, "the run began more than 1 h ago (max_hours)")


def test_only_failures_in_a_row_without_a_newer_checkpoint_end_training(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(meeting, 20)
    chain = Chain(followed(meeting, monkeypatch, {"failures": 1}, {"code": 75}), FOR_EVER, 0.0)
    assert chain.failures == 2
    assert "3 attempts in a row failed without a newer checkpoint than step_20" in chain.end_after(75, 0.0)
    assert chain.end_after(85, 0.0) == "", "one that saved and left has not failed"
    checkpoint(meeting, 25)
    assert chain.end_after(75, 0.0) == ""
    monkeypatch.setenv("SK_PREVIOUS", "7")
    third = attempt(Path(meeting.run), monkeypatch, "9")
    again = Chain(third, FOR_EVER, 0.0)
    assert (again.failures, again.step) == (0, 25)
    meeting.record("end.json", {"code": 85, "goes_on": True})
    meeting.record("start.json", {"job_id": "7", "attempt": 4, "run_started": 0, "failures": 2, "step": 25})
    assert Chain(third, FOR_EVER, 0.0).failures == 0, "nor has the one before, if it did so"


def test_attempts_and_hours_limit_a_run_where_they_are_given(meeting: Meeting) -> None:
    chain = Chain(meeting, FOR_EVER._replace(max_attempts=1, max_hours=2.0, trains=False), 0.0)
    assert chain.end_after(85, 7199.0) == "attempt 1 of 1 was the last (max_attempts)"
    assert chain.end_after(85, 7200.0) == (
        "attempt 1 of 1 was the last (max_attempts); the run began more than 2 h ago (max_hours)"
    )
    assert Chain(meeting, FOR_EVER._replace(trains=False), 0.0).end(500, 500, 1e9) == ""


@pytest.mark.parametrize(("published", "looks"), [((), 4), (("started",), 10), (("started", "exit_code"), 5)])
def test_only_a_node_that_misses_enough_heartbeats_is_lost(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, published: tuple[str, ...], looks: int
) -> None:
    monkeypatch.setattr(watch, "BEAT", 0.0)
    monkeypatch.setattr(watch.os, "kill", lambda *_: None)
    for name in published:
        meeting.publish(name, "75")
    keeper = watch.Watch(meeting, FOR_EVER._replace(until_done=False), None, "")
    for look in range(looks + 1):
        assert meeting.of("lost") == {}, look
        meeting.publish("alive.0", f"node1 {look}")
        meeting.publish("alive.1", "node2 5")
        keeper.look()
    assert meeting.of("lost") == {"1": "node2"}
    assert list(meeting.of("bad")) == list(meeting.of("failed")) == ["node2"]


def test_a_node_that_has_left_is_not_lost(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT", 0.0)
    meeting.publish("alive.1", "node2 5")
    meeting.publish("left.1", "0")
    keeper = watch.Watch(meeting, FOR_EVER._replace(until_done=False), None, "")
    for _ in range(30):
        keeper.look()
    assert meeting.of("lost") == {}


@pytest.mark.parametrize("version", [1, 2])
def test_oom_report_has_limit_and_peak_of_the_lowest_limited_cgroup(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setenv("SLURM_NODEID", "0")
    lines = f"{9 if version == 1 else 0}:{'memory' if version == 1 else ''}:/job/step\n"
    read = Meeting.__init__.__globals__["text_of"]
    monkeypatch.setattr(
        "slurmkit.keeper.node.text_of", lambda path: lines if path == "/proc/self/cgroup" else read(path)
    )
    job = tmp_path / ("memory/job" if version == 1 else "job")
    (job / "step").mkdir(parents=True)
    kills = job / "step" / ("memory.oom_control" if version == 1 else "memory.events")
    limit, peak = ("limit_in_bytes", "max_usage_in_bytes") if version == 1 else ("max", "peak")
    (job / "step/cgroup.procs").touch()
    (job / f"step/memory.{limit}").write_text("9223372036854771712" if version == 1 else "max")
    (job / f"memory.{limit}").write_text(str(600 << 20))
    (job / f"memory.{peak}").write_text(str(599 << 20))
    kills.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    node = Node(meeting, root=str(tmp_path))
    assert list(node.memory_reports()) == []
    kills.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    assert list(node.memory_reports()) == ["a process was killed for memory: limit 600 MiB, peak 599 MiB"]


def test_keeper_is_one_file_without_dependencies_for_old_pythons(tmp_path: Path) -> None:
    text = keeper_text()
    ast.parse(text, feature_version=(3, 6))
    assert "slurmkit.keeper" not in text
    (tmp_path / "keeper.py").write_text(text)
    alone = [sys.executable, "-I", "-S", "-B", tmp_path / "keeper.py", "--help"]
    assert "--max-attempts" in subprocess.run(alone, check=True, capture_output=True, text=True).stdout


def test_job_rendered_with_a_missing_keeper_version_is_refused(tmp_path: Path) -> None:
    ours, other = f"/r/{name_of_keeper()} ", "/r/keeper-0123456789ab.py "
    assert digest_of_keeper().startswith(name_of_keeper()[7:19])
    assert keeper_for(ours, tmp_path) == {name_of_keeper(): keeper_text()}
    assert keeper_for("no keeper", tmp_path) == {}
    with pytest.raises(UserError, match=r"another slurmkit's keeper-0123456789ab\.py.*render it again"):
        keeper_for(other, tmp_path)
    (tmp_path / "keeper-0123456789ab.py").touch()
    assert keeper_for(other, tmp_path) == {}
