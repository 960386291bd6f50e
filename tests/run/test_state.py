"""The state of a run: from folders as jobs leave them, with and without Slurm's word on them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from slurmkit.errors import Failure
from slurmkit.run.state import FINAL, Queue, RunState, read_states
from tests.support.run_directories import Made, Slurm, job

LOST = 600.0


class Case(NamedTuple):
    make: Callable[[Made], object]
    slurm: Slurm | None
    state: str
    reason: str
    """A pattern of the whole reason."""
    code: int | None = None
    job_id: str | None = "12"
    next: str | None = None


def going_on(made: Made) -> Made:
    """12 ended with its node, and 14 is queued for it."""
    made.record("12").start("12.0", 900).put("12.0", "next", "14\n")
    return made.end("12.0", 500, 75, "node node2: its raylet died", bad_nodes=["node2"], goes_on=True)


CASES = {
    "submitted, asked": Case(
        lambda made: made.record("12"),
        Slurm(job("12", "PENDING", "Priority", start="2031-05-06T07:08:09")),
        "queued",
        "waiting for its turn by priority, expected to start at 2031-05-06 07:08",
    ),
    "submitted, no Slurm": Case(
        lambda made: made.record("12"), None, "queued", "job 12, as far as its files tell: Slurm was not asked"
    ),
    "submitted and forgotten": Case(
        lambda made: made.record("12"), Slurm(), "never started", "Slurm has forgotten job 12, which never began", 1
    ),
    "cancelled in the queue with scancel": Case(
        lambda made: made.record("12"),
        Slurm(job("12", "CANCELLED")),
        "cancelled",
        "job 12 was cancelled before it began",
        143,
    ),
    "ended before its attempt began": Case(
        lambda made: made.record("12"), Slurm(job("12", "FAILED", exit_code=78)), "failed", "job 12 ended before .*", 78
    ),
    "allocated": Case(
        lambda made: made.record("12"),
        Slurm(job("12", "RUNNING", nodes="node[1-2,7]")),
        "starting",
        "0 of 3 nodes ready",
    ),
    "coming up": Case(
        lambda made: (
            made.record("12").start("12.0", 5, nodes="a[1-2]b[1-2],c").put("12.0", "bringup/head", "x")
            and made.put("12.0", "bringup/ready.3", "node4 10.0.0.1 8")
        ),
        Slurm(job("12", "RUNNING")),
        "starting",
        "2 of 5 nodes ready",
    ),
    "running": Case(
        lambda made: made.record("12").start("12.0", 300).alive("12.0", 1), Slurm(job("12", "RUNNING")), "running", ""
    ),
    "running, no Slurm": Case(lambda made: made.record("12").start("12.0", 300).alive("12.0", 1), None, "running", ""),
    "running on another cluster": Case(
        lambda made: made.record("12").start("12.0", 300).alive("12.0", 1), Slurm(), "running", ""
    ),
    "running, and a stranger has its id here": Case(
        lambda made: made.record("12").start("12.0", 300).alive("12.0", 1),
        Slurm(job("12", "FAILED", name="other", exit_code=3)),
        "running",
        "",
    ),
    "running, silent": Case(
        lambda made: made.record("12").start("12.0", 900).alive("12.0", LOST),
        Slurm(job("12", "RUNNING")),
        "running",
        "no sign of life for 10:00",
    ),
    "suspended": Case(
        lambda made: made.record("12").start("12.0", 900).alive("12.0", 1),
        Slurm(job("12", "SUSPENDED")),
        "running",
        "suspended",
    ),
    "running with its follow-up in the queue": Case(
        lambda made: made.record("12").start("12.0", 300).alive("12.0", 1).put("12.0", "next", "14\n"),
        Slurm(job("12", "RUNNING"), job("14", "PENDING", "Dependency")),
        "running",
        "",
        next="14",
    ),
    "the command has ended, the job not yet": Case(
        lambda made: made.record("12").start("12.0", 300).alive("12.0", 1).put("12.0", "bringup/exit_code", "0"),
        Slurm(job("12", "COMPLETING")),
        "running",
        "completing",
    ),
    "going on": Case(
        going_on,
        Slurm(job("12", "FAILED", exit_code=75), job("14", "PENDING", "Resources")),
        "going on",
        "follow-up job 14: next in turn, waiting for nodes to become free",
        job_id="14",
    ),
    "going on, no Slurm": Case(going_on, None, "going on", "follow-up job 14, as far as its files .*", job_id="14"),
    "going on after an attempt that left no record": Case(
        lambda made: made.record("12").start("12.0", 900).alive("12.0", LOST).put("12.0", "next", "14"),
        Slurm(job("14", "PENDING", "QOSMaxGRESPerUser")),
        "going on",
        "follow-up job 14: at a limit of its QOS: GPUs per user",
        job_id="14",
    ),
    "the follow-up was cancelled with scancel": Case(
        going_on,
        Slurm(job("14", "CANCELLED")),
        "cancelled",
        "follow-up job 14 was cancelled before it began",
        143,
        "14",
    ),
    "the follow-up has vanished": Case(
        going_on, Slurm(), "lost", "Slurm has forgotten follow-up job 14, which never began", 1, "14"
    ),
    "the second attempt": Case(
        lambda made: (
            going_on(made).start("14.0", 100, previous="12", nodes="node[3-4]", max_attempts=20).alive("14.0", 1)
        ),
        Slurm(job("14", "RUNNING")),
        "running",
        "attempt 2 of 20",
        job_id="14",
    ),
    "a follow-up that found nothing left to do": Case(
        lambda made: (
            made.record("12").start("12.0", 900).end("12.0", 500, 0, "the command is done").put("12.0", "next", "14")
            and made.start("14.0", 400, previous="12").end("14.0", 399, 3)
        ),
        Slurm(),
        "done",
        "",
        0,
    ),
    "requeued": Case(
        lambda made: made.record("12").start("12.0", 900).end("12.0", 100, 143, "preempted"),
        Slurm(job("12", "PENDING", "BeginTime", restarts=1)),
        "going on",
        "job 12 is queued again: waiting for the time before which it must not start",
    ),
    "requeued and allocated": Case(
        lambda made: made.record("12").start("12.0", 900).alive("12.0", 1),
        Slurm(job("12", "RUNNING", restarts=1, nodes="node[1-2]")),
        "starting",
        "0 of 2 nodes ready",
    ),
    "submitted again after its end": Case(
        lambda made: made.record("12", "15").start("12.0", 900).end("12.0", 500, 0),
        Slurm(job("15", "PENDING", "JobHeldUser")),
        "queued",
        "held by its user: scontrol release lets it go on",
        job_id="15",
    ),
    "done": Case(lambda made: made.record("12").start("12.0", 900).end("12.0", 500, 0), None, "done", "", 0),
    "failed": Case(
        lambda made: made.record("12").start("12.0", 900).end("12.0", 500, 1, "the command\nfailed \x1b[2Jwith 1"),
        None,
        "failed",
        r"the command failed  \[2Jwith 1",
        1,
    ),
    "cancelled": Case(
        lambda made: made.record("12").start("12.0", 900).end("12.0", 500, 143, "cancelled", cancelled=True),
        Slurm(job("12", "PENDING", restarts=1)),
        "cancelled",
        "cancelled",
        143,
    ),
    "interrupted": Case(
        lambda made: made.record("12").start("12.0", 900).end("12.0", 500, 85, "interrupted: out of time"),
        None,
        "interrupted",
        "out of time; submit it again to go on",
        85,
    ),
    "cancelled in the queue, and started nevertheless": Case(
        lambda made: made.record("12").end("12.0", 500, 143, cancelled=True).start("12.0", 400).alive("12.0", 1),
        None,
        "running",
        "",
    ),
    "lost, no Slurm": Case(
        lambda made: made.record("12").start("12.0", 900).alive("12.0", LOST),
        None,
        "lost",
        "no sign of life for 10:00, and no record of its end",
        1,
    ),
    "lost and forgotten": Case(
        lambda made: made.record("12").start("12.0", 900).put("12.0", "driver.log", age=LOST),
        Slurm(),
        "lost",
        "no sign of life .*",
        1,
    ),
    "killed with its node": Case(
        lambda made: made.record("12").start("12.0", 900).alive("12.0", LOST),
        Slurm(job("12", "NODE_FAIL")),
        "lost",
        "a node failed",
        1,
    ),
    "out of time, killed hard": Case(
        lambda made: made.record("12").start("12.0", 900).alive("12.0", 1),
        Slurm(job("12", "TIMEOUT", signal=9)),
        "lost",
        "out of time",
        137,
    ),
    "no record, no heartbeats, no Slurm": Case(
        lambda made: made.record("12").put("12.0", "driver.log", age=LOST),
        None,
        "running",
        "as far as its files tell, 10:00 old: Slurm was not asked",
    ),
    "an older slurmkit's, ended": Case(
        lambda made: made.record("12").put("12.0", "bringup/exit_code", "3\n", 500), Slurm(), "failed", "exit code 3", 3
    ),
    "an older slurmkit's, whose node failed": Case(
        lambda made: made.record("12").put("12.0", "bringup/failed.node2", "its raylet died\n", 500),
        None,
        "failed",
        "node node2: its raylet died",
        75,
    ),
    "local, ended": Case(
        lambda made: made.record(one="local-1").start("local-1", 50).end("local-1", 5, 0), None, "done", "", 0, None
    ),
    "local on another machine": Case(
        lambda made: made.record(one="local-1").start("local-1", 50, nodes="elsewhere", pid=1).put("local-1", "x"),
        None,
        "running",
        "on elsewhere",
        job_id=None,
    ),
    "local, its number taken by another process": Case(
        lambda made: made.record(one="local-1").start("local-1", 1e9, nodes=socket.gethostname(), pid=os.getpid()),
        None,
        "lost",
        "its process is gone, and there is no record of its end",
        1,
        None,
    ),
    "local of an older slurmkit, all steps made": Case(
        lambda made: made.record(one="local-1").put("local-1", "driver.log").steps({"a": 1}, last_step=1),
        None,
        "done",
        "",
        0,
        None,
    ),
    "nothing but a folder": Case(
        lambda made: (made.path / "attempts").mkdir(), None, "never started", "there is no record .*", 1, None
    ),
    "broken records": Case(
        lambda made: (
            made.record("12").put("12.0", "start.json", "{").put("12.0", "end.json", "[]").put("12.0", "next", "x")
            and made.put("12.0", "bringup/exit_code", "")
        ),
        Slurm(job("12", "RUNNING")),
        "starting",
        "0 of 2 nodes ready",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_what_its_files_and_slurm_say(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    made = Made(tmp_path / "run")
    case.make(made)
    state = state_of(made, case.slurm)
    assert (state.state, state.job_id, state.next, state.code) == (case.state, case.job_id, case.next, case.code)
    assert re.fullmatch(case.reason, state.reason), state.reason
    assert state.is_final == (case.state in FINAL) == (case.code is not None)


def state_of(made: Made, slurm: Slurm | None) -> RunState:
    (state,) = read_states([made.path], Queue(slurm), made.now)
    return state


def test_metrics_use_the_last_lines_and_time_left_uses_the_last_steps(tmp_path: Path) -> None:
    made = Made(tmp_path / "run").record("12").start("12.0", 3700).alive("12.0", 1)
    (made.path / "step_2").mkdir()
    (made.path / "step_10").mkdir()
    (made.path / "step_2/manifest.json").touch()
    first = {"val:accuracy": 0.5, "time:step": 1e6}
    rows = [{"train:reward_mean": 0.25, "time:step": 3.0, "padding": "x" * 900}] * 99
    rows += [{"train:reward_mean": 0.75, "time:step": 23.0, "time:validation": 20.0}]
    made.steps(first, *rows, last_step=201)
    state = state_of(made, Slurm(job("12", "RUNNING", time_limit=90)))
    # Of the last 20 steps, one had a validation.
    assert state.left == pytest.approx(100 * (20 * 3.0 + 20.0) / 20)
    assert (state.step, state.last_step, state.reward, state.accuracy) == (101, 201, 0.75, 0.5)
    assert (state.elapsed, state.limit, state.checkpoint) == (3700.0, 5400.0, "step_2")
    assert state_of(made, None).limit == 3600.0


def test_all_attempts_are_told_in_their_order_with_what_ended_each(tmp_path: Path) -> None:
    made = Made(tmp_path / "run")
    going_on(made).start("14.0", 400, previous="12", nodes="node[3-4]").end("14.0", 300, 85, goes_on=True)
    # 9 came after 14: ids have begun anew; a mistake and a second submission by hand.
    made.put("14.0", "next", "9").start("9.0", 250, previous="14").end("9.0", 200, 2)
    made.record("12", "16").start("16.0", 100).start("16.1", 50).alive("16.1", 1)
    state = state_of(made, None)
    assert [attempt.name for attempt in state.attempts] == ["12.0", "14.0", "9.0", "16.0", "16.1"]
    assert [attempt.code for attempt in state.attempts] == [75, 85, 2, None, None]
    assert state.attempts[0].bad_nodes == ("node2",)
    assert state.as_json()["attempts"][1]["nodes"] == "node[3-4]"


def test_slurm_is_queried_once_for_all_runs_and_not_for_forgotten_jobs(tmp_path: Path) -> None:
    paths = []
    for number in range(100):
        made = Made(tmp_path / f"run{number}").record(str(number)).start(f"{number}.0", 900)
        paths.append(made.path)
        if number >= 50:
            made.end(f"{number}.0", 500, 0)
    running = [job(str(number), "RUNNING", name=f"run{number}") for number in range(25)]
    slurm = Slurm(*running)
    queue = Queue(slurm)
    states = [state.state for state in read_states(paths, queue)]
    assert states == ["starting"] * 25 + ["lost"] * 25 + ["done"] * 50
    assert slurm.asked == 1
    assert [state.state for state in read_states(paths, queue)] == states
    assert slurm.asked == 2
    read_states(paths[25:], queue)
    assert slurm.asked == 2, "those that run are not among these"


def test_state_comes_from_the_files_if_slurm_fails_and_queue_has_the_error(tmp_path: Path) -> None:
    class Away(Slurm):
        def jobs(self, *_: object, **__: object) -> tuple[()]:
            raise Failure("squeue gave no answer")

    made = Made(tmp_path / "run").record("12").start("12.0", 900).alive("12.0", 1)
    queue = Queue(Away())
    assert read_states([made.path], queue)[0].state == "running"
    assert queue.problem == "squeue gave no answer"


@pytest.mark.parametrize(("program", "state"), [("slurmkit", "running"), ("another", "lost")])
def test_a_local_run_is_running_as_long_as_its_process(tmp_path: Path, program: str, state: str) -> None:
    made = Made(tmp_path / "run").record(one="local-1").put("local-1", "driver.log")
    with subprocess.Popen(["bash", "-c", "read -r -t 60", program], stdin=subprocess.PIPE) as process:
        facts = {"nodes": socket.gethostname(), "pid": process.pid}
        # Long before this process: it has only taken the number.
        assert state_of(made.start("local-1", 1e6, **facts), None).state == "lost"
        made.start("local-1", made.now - time.time() - 1, **facts)
        assert state_of(made, None).state == state
        process.kill()
        process.wait()
    assert state_of(made, None).state == "lost"
