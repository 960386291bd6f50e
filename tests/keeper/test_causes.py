"""Who is to blame for the end of an attempt: a node, all nodes alike, the container, the command, or Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurmkit.keeper import follow_up, node, watch
from slurmkit.keeper.chain import Chain, Limits, begin
from slurmkit.keeper.follow_up import FollowUp
from slurmkit.keeper.judge import judge, lines_after
from slurmkit.keeper.meeting import Meeting
from slurmkit.keeper.node import Node
from slurmkit.keeper.stand_in import StandIn
from slurmkit.keeper.watch import Watch
from tests.support.attempts import attempt, followed, meeting

__all__ = ["meeting"]  # a fixture
FOR_EVER = Limits(until_done=True, max_attempts=None, max_hours=None, trains=False)
SETUP = "a line of setup or of the bring-up failed"
PYXIS = """slurmkit: job 5 on 2 nodes (node[1-2]), logs in /r/attempts/5.0
slurmstepd: error: pyxis: container start failed with error code: 1
slurmstepd: error: pyxis: printing enroot log file:
slurmstepd: error: pyxis:     [ERROR] No such file or directory: /images/x.sqsh
slurmstepd: error: pyxis: couldn't start container
slurmstepd: error: spank: required plugin spank_pyxis.so: task_init() failed with rc=-1
slurmstepd: error: Failed to invoke spank plugin stack
srun: error: node1: task 0: Exited with exit code 1
srun: Terminating StepId=5.0
"""


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Put a command in front of PATH."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_a_failure_on_all_nodes_blames_none_and_quotes_the_log(meeting: Meeting) -> None:
    for name in ("node1", "node2"):
        meeting.publish(f"bad.{name}", SETUP)
        meeting.publish(f"failed.{name}", SETUP)
        log = f"10:00:00 +0s node 0 of 2: {name}\nbash: line 9: module: command not found\n\n10:00:01 +1s failed: x\n"
        Path(meeting.folder, f"node-{name}.log").write_text(log)
    verdict = judge(meeting, "", False)
    assert (verdict.code, verdict.bad_nodes, verdict.never_started) == (75, [], True)
    assert verdict.reason == f"all 2 nodes failed: {SETUP}: bash: line 9: module: command not found"


def test_a_failure_on_one_node_blames_it_and_quotes_its_log(meeting: Meeting) -> None:
    meeting.publish("bad.node2", SETUP)
    meeting.publish("failed.node2", SETUP)
    Path(meeting.folder, "node-node2.log").write_text("10:00:00 +0s node 1 of 2: node2\nmount failed\n")
    verdict = judge(meeting, "", False)
    assert (verdict.code, verdict.bad_nodes, verdict.never_started) == (75, ["node2"], True)
    assert verdict.reason == f"node node2: {SETUP}: mount failed"


def test_two_attempts_in_a_row_that_never_start_end_the_run(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Chain(meeting, FOR_EVER, 0.0)
    assert first.end_after(75, 0.0, never_started=True) == ""
    second = Chain(followed(meeting, monkeypatch, {}, {"never_started": True}), FOR_EVER, 0.0)
    assert second.end_after(75, 0.0) == ""
    assert second.end_after(75, 0.0, never_started=True) == "2 attempts in a row ended before the command started"


def test_an_attempt_that_lost_a_node_may_be_followed_again_and_again(meeting: Meeting) -> None:
    for name in ("lost.1", "failed.node2", "bad.node2"):
        meeting.publish(name, "node2")
    assert not judge(meeting, "", False).never_started


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (
            PYXIS,
            "node node1: pyxis: container start failed with error code: 1 | "
            "pyxis:     [ERROR] No such file or directory: /images/x.sqsh",
        ),
        (
            "FATAL:   could not open image /x.sif: not found\nsrun: error: node2: task 1: Exited with exit code 255\n",
            "node node2: FATAL:   could not open image /x.sif: not found",
        ),
    ],
)
def test_a_container_that_does_not_start_is_named_with_its_words(meeting: Meeting, output: str, words: str) -> None:
    meeting.publish("over", "75 srun ended with 1")
    verdict = judge(meeting, "", False, output.splitlines(), container=True)
    assert verdict.reason == " ".join(f"the container did not start on {words}".split())
    assert (verdict.code, verdict.never_started) == (75, True)
    assert verdict.bad_nodes == [words.split()[1].rstrip(":")]


def test_what_srun_said_is_read_from_this_attempt_s_first_line_on(tmp_path: Path) -> None:
    log, mark = tmp_path / "slurm-5.out", "logs in /r/attempts/5.1"
    log.write_text(PYXIS + PYXIS.replace("5.0", "5.1").replace("node1", "node3"))
    assert [line for line in lines_after(str(log), mark) if "task 0" in line] == [
        "srun: error: node3: task 0: Exited with exit code 1"
    ]
    assert lines_after(str(log), "logs in /r/attempts/6.0") == lines_after(str(tmp_path / "none"), mark) == []


def test_a_container_that_starts_on_no_node_blames_none(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(tmp_path, monkeypatch, "scontrol", "echo node1; echo node2")
    meeting.publish("over", "75 srun ended with 125")
    output = [
        'Error: workdir "/nope" does not exist on container 3f',
        "srun: error: node[1-2]: tasks 0-1: Exited with exit code 125",
    ]
    verdict = judge(meeting, "", False, output, container=True)
    assert verdict.bad_nodes == []
    assert verdict.reason.startswith('the container did not start on 2 nodes (node1, …): Error: workdir "/nope" does')


def test_a_node_that_has_begun_is_not_one_that_did_not_start(meeting: Meeting) -> None:
    Path(meeting.folder, "node-node1.log").touch()
    meeting.publish("over", "75 srun ended with 1")
    verdict = judge(meeting, "", False, ["srun: error: node1: task 0: Exited with exit code 1"])
    assert (verdict.reason, verdict.bad_nodes) == ("the command did not finish (srun ended with 1)", [])


def test_the_watchdog_s_end_blames_no_node(meeting: Meeting) -> None:
    meeting.publish("over", "75 srun ended with 0")
    meeting.publish("failed.watchdog", "no progress for 30 s")
    assert judge(meeting, "", False).said == [("no progress for 30 s", "")]


def test_a_step_that_srun_ends_in_bring_up_was_not_ended_by_slurm(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(tmp_path, monkeypatch, "squeue", "echo 'RUNNING None N/A'")
    watch = Watch(meeting, FOR_EVER._replace(until_done=False), None, "")
    meeting.publish("signal.TERM")
    watch.look()
    meeting.publish("over", "75 srun ended with 1")
    verdict = judge(meeting, "", False, PYXIS.splitlines(), container=True)
    assert verdict.code == 75
    assert "the container did not start on node node1" in verdict.reason


def test_a_node_that_ray_marks_dead_fails_once_the_command_has_ended(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setattr(node, "GRACE", 1000.0)
    line = (
        "[2026-11-30 22:47:01,191 W 20331 20331] (gcs_server) gcs_node_manager.cc:761: The node with node id: 05ec and "
        "address: {0} and node name: {0} has been marked dead because the detector has missed too many heartbeats\n"
    )
    logs = tmp_path / "r/session_latest/logs"
    logs.mkdir(parents=True)
    (logs / "gcs_server.out").write_text(line.format("10.0.0.1"))
    part = Node(meeting)
    monkeypatch.setattr(part, "_scratch", str(tmp_path))
    meeting.publish("ready.1", "node2 10.0.0.2 0")
    part.look_at_ray()
    (logs / "gcs_server.out").write_text(2 * line.format("10.0.0.1"))
    meeting.publish("started", "1")
    part.look_at_ray()
    with (logs / "gcs_server.out").open("a") as log:
        log.write(line.format("10.0.0.2"))
    part.look_at_ray()
    assert meeting.of("bad") == {}, "the command may have a message of its own"
    part.look_at_ray(is_last=True)
    assert meeting.of("bad") == {"node2": "Ray has marked it dead, as it did not answer"}, "not what bring-up lost"
    assert list(meeting.of("failed")) == ["node2"]


@pytest.mark.parametrize(
    ("answer", "code", "reason"),
    [
        ("TIMEOUT|0:0|2026-11-30T22:00:00", 75, "killed at its time limit"),
        ("FAILED|0:9|2026-11-30T22:00:00", 137, "the batch script was killed"),
        ("CANCELLED by 0|0:15|Unknown", 143, "cancelled"),
        ("", None, None),
        ("COMPLETED|0:0|2026-11-30T22:00:00", None, None),
    ],
)  # fmt: skip
def test_an_attempt_without_a_record_gets_one_from_accounting(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, code: int | None, reason: str | None
) -> None:
    fake(tmp_path, monkeypatch, "sacct", f"[[ -n '{answer}' ]] && echo '{answer}'")
    begin(followed(meeting, monkeypatch, {}, None), FOR_EVER)
    path = Path(meeting.folder, "end.json")
    end = json.loads(path.read_text()) if path.exists() else {}
    said = reason and f"{reason}, before it recorded its end (Slurm: {answer.partition('|')[0].split()[0]})"
    assert (end.get("code"), end.get("reason")) == (code, said)
    assert end.get("goes_on") is (True if end else None)


def test_accounting_does_not_replace_an_attempt_s_own_record(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(tmp_path, monkeypatch, "sacct", "echo 'FAILED|0:9|2026-11-30T22:00:00'")
    begin(followed(meeting, monkeypatch, {}, {"code": 85}), FOR_EVER)
    assert json.loads(Path(meeting.folder, "end.json").read_text())["code"] == 85


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["echo 'Unable to contact slurm controller' >&2; exit 1", "exit 0"], "and without node2"),
        (["exit 124", "exit 0"], "and without node2"),
        (["echo 'allocation failure: Node count' >&2; exit 1"], "as Slurm refuses the job without: allocation failure"),
    ],
)
def test_a_silent_slurmctld_does_not_bring_a_bad_node_back(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    answers: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(follow_up, "PAUSE", 0.0)
    count = tmp_path / "count"
    cases = "\n".join(f"{number}) {answer} ;;" for number, answer in enumerate(answers, 1))
    fake(tmp_path, monkeypatch, "sbatch", f"echo x >>{count}; case $(wc -l <{count}) in\n{cases}\nesac")
    fake(tmp_path, monkeypatch, "scontrol", "exit 0")
    Path(meeting.folder, "next").write_text("8")
    FollowUp(meeting, queues=False).take_over(["node2"], "")
    assert said in capsys.readouterr().out


def test_a_first_node_that_answers_again_leaves_the_end_to_the_second(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(tmp_path, monkeypatch, "squeue", "echo 'COMPLETING None N/A'")
    fake(tmp_path, monkeypatch, "scancel", f"touch {tmp_path}/cancelled")
    Path(meeting.folder, "next").write_text("8")
    meeting.publish("started", "1")
    second = Watch(meeting, FOR_EVER, None, "", stands_in=True)
    second.lose("0", "node1", "no sign of life for 20 s")
    assert second.conclude() == 75
    meeting.publish("signal.TERM", "ended by Slurm")  # the second node's scancel
    meeting.publish("over", "143 srun ended with 143")
    assert Watch(meeting, FOR_EVER, None, "", stands_in=True).until_over() == 75
    assert json.loads(Path(meeting.folder, "end.json").read_text())["goes_on"] is True
    assert not Path(tmp_path, "cancelled").exists()


def test_a_node_that_died_is_named_though_srun_has_ended_at_once(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "BEAT", 0.1)
    for name, text in {"alive.0": "node1 3", "alive.1": "node2 3", "started": "1", "exit_code": "75"}.items():
        meeting.publish(name, text)
    meeting.publish("srun", str(2**22 + 1))  # no process
    meeting.publish("left.0", "0")
    meeting.publish("over", "75 srun ended with 137")
    assert Watch(meeting, FOR_EVER._replace(until_done=False), None, "").until_over() == 75
    assert json.loads(Path(meeting.folder, "end.json").read_text())["bad_nodes"] == ["node2"]


def test_a_second_node_ends_the_job_once(meeting: Meeting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(tmp_path, monkeypatch, "scancel", f"echo x >>{tmp_path}/cancelled")
    for name in ("alive.0", "watching"):
        meeting.publish(name, "node1 5")
    part = StandIn(meeting, FOR_EVER._replace(until_done=False), "")
    for _ in range(10):
        part.look()
    assert Path(tmp_path, "cancelled").read_text() == "x\n"


@pytest.fixture
def part(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    monkeypatch.setenv("SLURM_NODEID", "1")
    return Node(meeting)


def test_a_node_gives_signs_of_life_while_it_removes_leftovers(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, part: Node
) -> None:
    Path(meeting.folder).with_name("6.0").mkdir()
    seen = []

    def rmtree(*_: object, **__: object) -> None:
        deadline = time.monotonic() + 5
        while not meeting.of("alive") and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(list(meeting.of("alive")))
        part._leave()

    monkeypatch.setattr(node.shutil, "rmtree", rmtree)
    part.run()
    assert seen == [["1"]]


def test_a_process_whose_log_is_deleted_does_not_end_its_node(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, part: Node
) -> None:
    monkeypatch.setattr(node, "_processes", lambda: iter([(2**22 + 1, "/tmp/sk-7.0/r/worker.err (deleted)")]))
    monkeypatch.setattr(node, "_is_python", lambda _: True)
    monkeypatch.setattr(node.time, "sleep", lambda _: None)
    part.write_stacks()
    assert meeting.has("stacks.1")


def test_a_process_that_writes_its_stacks_slowly_is_waited_for(meeting: Meeting, part: Node) -> None:
    program = (
        "import os, signal, sys, time\n"
        "def slowly(*_):\n    time.sleep(2.5)\n    os.write(2, b'in a function')\n    os._exit(1)\n"
        "signal.signal(signal.SIGABRT, slowly)\nprint('up', flush=True)\ntime.sleep(60)\n"
    )
    with Path(meeting.folder, "driver.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=log)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        part.write_stacks()
    assert Path(meeting.folder, f"stacks-node2-{process.pid}.txt").read_text() == "in a function\n"


def test_an_array_s_tasks_are_recorded_as_such(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    task = attempt(Path(meeting.run), monkeypatch, "11")
    begin(task, FOR_EVER._replace(until_done=False))
    assert json.loads(Path(task.folder, "start.json").read_text())["array"] == ["9", 3]
