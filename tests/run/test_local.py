"""`slurmkit run` with somebody else's command: the run directory, attempts, exit codes and interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import psutil
import pytest

from slurmkit.errors import UserError
from slurmkit.run import local
from slurmkit.run.leftovers import own_mark
from tests.support.requirements import SLURMKIT


def run(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SLURMKIT, "run", *arguments], cwd=here, capture_output=True, text=True, timeout=60)


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_command_runs_as_typed_with_its_environment_and_output_is_logged(here: Path) -> None:
    (here / "job.yaml").write_text("setup: ['Z=own', 'export X=from-setup']\nenv: {Y: it's}\n")
    done = run(here, "job.yaml", "--name", "hello", "--", "bash", "-c", 'echo "$0|$X|$Y|$Z"', "a 'b' $c\nd")
    assert done.returncode == 0, done.stderr
    log = here / "results/hello/attempts/latest/driver.log"
    assert log.read_text() == "a 'b' $c\nd|from-setup|it's|\n"


def test_the_exit_code_is_the_command_s_and_the_end_of_its_log_is_shown(here: Path) -> None:
    done = run(here, "--", "bash", "-c", "echo the reason; exit 7")
    assert done.returncode == 7
    assert "the reason" in done.stdout
    assert "exit code 7" in done.stderr


def test_a_run_keeps_what_was_settled_and_where_each_value_was_set(here: Path) -> None:
    (here / "job.yaml").write_text("env: {Y: it's}\n")
    assert run(here, "job.yaml", "--name", "kept", "--", "true").returncode == 0
    kept = json.loads((here / "results/kept/settled.json").read_text())
    assert kept["spec"]["env"] == {"Y": "it's"}
    origins = {key: kept["origins"][key] for key in ("name", "env.Y", "comment")}
    assert origins == {"name": "command line: name", "env.Y": "job.yaml:1", "comment": "default"}


def test_running_the_same_again_is_another_attempt_of_the_same_run(here: Path) -> None:
    for _ in range(2):
        assert run(here, "--", "true").returncode == 0
    record = json.loads((here / "results/true/run.json").read_text())
    assert [attempt["local"] for attempt in record["attempts"]] == ["local-1", "local-2"]
    assert os.readlink(here / "results/true/attempts/latest") == "local-2"
    start = json.loads((here / "results/true/attempts/local-2/start.json").read_text())
    assert (start["local"], start["attempt"], start["previous"]) == ("local-2", 1, None), "nobody's follow-up"


def test_another_command_under_a_used_name_is_refused(here: Path) -> None:
    run(here, "--name", "x", "--", "true")
    done = run(here, "--name", "x", "--", "echo", "other")
    assert done.returncode == 2
    assert "holds a run with another command" in done.stderr
    assert not (here / "results/x/attempts/local-2").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_and_its_children(here: Path, number: int, code: int) -> None:
    # One process that leaves when asked, and one that has to be made to.
    script = "trap 'echo asked; exit 3' TERM; (trap '' TERM; sleep 300 & echo $! >pid.new; mv pid.new pid; wait) & wait"
    child = subprocess.Popen([SLURMKIT, "run", "--", "bash", "-c", script], cwd=here, stderr=subprocess.PIPE, text=True)
    wait_for(here / "pid")
    time.sleep(0.2)
    child.send_signal(number)
    assert child.wait(30) == code
    assert (here / "results/bash/attempts/latest/driver.log").read_text() == "asked\n"
    left = int((here / "pid").read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def test_a_closed_pipe_does_not_end_the_command_or_change_its_exit_code(here: Path) -> None:
    script = 'echo one; sleep 2; echo \'{"step": 0, "val:accuracy": 1}\' >results/x/metrics.jsonl; exit 7'
    command = [SLURMKIT, "run", "--name", "x", "--", "bash", "-c", script]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run directory")
    process.stdout.close()
    process.wait(30)
    assert json.loads((here / "results/x/attempts/latest/end.json").read_text())["code"] == 7


def test_a_project_s_node_count_does_not_reach_a_run_on_this_machine(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("nodes: 8\n")
    config = "env: {name: arithmetic}\npolicy: {from_scratch: {}}\ncluster: {num_nodes: 8}\n"
    (here / "train.yaml").write_text(config)
    done = run(here, "--config", "train.yaml")
    assert done.returncode == 2
    assert "train.yaml:3) but the job has nodes 1 (command line: nodes)" in done.stderr


def test_two_runs_at_once_do_not_share_a_directory(here: Path) -> None:
    script = "touch started; sleep 300"
    first = subprocess.Popen([SLURMKIT, "run", "--name", "x", "--", "bash", "-c", script], cwd=here)
    try:
        wait_for(here / "started")
        done = run(here, "--name", "x", "--", "bash", "-c", script)
        assert done.returncode == 2
        assert "another slurmkit run is at work here" in done.stderr
    finally:
        first.send_signal(signal.SIGINT)
        first.wait(30)


# One process that leaves when asked, one that does not, and one without the run's environment, as Ray's agents are.
STUBBORN = """
(trap '' TERM; sleep 301) & echo $! >pids
env -i sleep 302 & echo $! >>pids
echo $$ >>pids
mkdir "$FOLDER"; echo "$SK_MARK $(readlink /proc/self/ns/pid)" >"$FOLDER/mark"
mv pids started; sleep 303
"""


@pytest.mark.parametrize("kill", [os.killpg, os.kill])
def test_a_killed_run_s_command_ends_and_the_next_one_waits_for_that(
    here: Path, kill: Callable[[int, int], None]
) -> None:
    folder = Path(f"/tmp/slurmkit-test-{os.getpid()}")
    command = [SLURMKIT, "run", "--name", "x", "--", "bash", "-c", f"[ -e started ] || {{ {STUBBORN} }}"]
    first = subprocess.Popen(command, cwd=here, env={**os.environ, "FOLDER": str(folder)}, start_new_session=True)
    wait_for(here / "started")
    kill(first.pid, signal.SIGKILL)
    assert first.wait(10) == -signal.SIGKILL
    pids = [int(line) for line in (here / "started").read_text().split()]
    assert any(map(psutil.pid_exists, pids))
    again = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60)
    left = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert left == []
    assert not folder.exists()
    assert again.returncode == 0, again.stderr
    assert "the last attempt was killed: waiting up to 60 s until its processes have ended" in again.stdout


@pytest.fixture
def lock(tmp_path: Path) -> TextIO:
    (tmp_path / "attempts").mkdir()
    return (tmp_path / "attempts" / ".lock").open("a+")


def test_a_run_is_refused_when_a_killed_one_s_processes_stay(
    tmp_path: Path, lock: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_PATIENCE", 0.2)
    pid, _, start = own_mark().removeprefix("local-").partition(".")
    dead = {"SK_MARK": f"local-{pid}.{int(start) - 1}", "SK_ATTEMPT_DIR": str(tmp_path / "attempts/local-1")}
    said: list[str] = []
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, **dead}, start_new_session=True)
    try:
        with pytest.raises(UserError) as refused:
            local._wait_until_free(tmp_path, lock, said.append)
    finally:
        process.kill()
        process.wait()
    assert f"still at work here after 0.2 s: sleep 60 ({process.pid}). End them: slurmkit cleanup" in str(refused.value)
    assert len(said) == 1
    local._wait_until_free(tmp_path, lock, said.append)
    assert len(said) == 1
