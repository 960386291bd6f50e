"""`slurmkit logs`: what is shown of files that grow, are replaced and are not there yet, and when it ends."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from slurmkit.cli.logs import for_terminal
from slurmkit.run.logs import Tail
from tests.support.cluster import Cluster
from tests.support.requirements import SLURMKIT

# Without Slurm: its commands are not on this PATH.
NO_SLURM = {**os.environ, "PATH": str(SLURMKIT.parent)}


def make_attempt(run: Path, name: str, **start: Any) -> Path:
    """An attempt's folder as a job begins it."""
    folder = run / "attempts" / name
    (folder / "bringup").mkdir(parents=True)
    job_id, _, restart = name.partition(".")
    record = {"job_id": job_id, "restart": int(restart), "nodes": "node1", "started": time.time(), **start}
    (folder / "start.json").write_text(json.dumps(record))
    return folder


def which(program: str) -> str:
    found = shutil.which(program)
    assert found is not None
    return found


def end(folder: Path, code: int, **facts: Any) -> None:
    record = {"code": code, "reason": "", "ended": time.time(), "bad_nodes": [], "goes_on": False, "cancelled": False}
    (folder / ".end.json").write_text(json.dumps(record | facts))
    (folder / ".end.json").rename(folder / "end.json")


class Follower:
    """A running `slurmkit logs`, read as it writes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def row(self) -> tuple[Any, ...]:
        row = json.loads(self.line())
        return row["attempt"], row["source"], row["text"]

    def rest(self) -> str:
        return self.process.communicate(timeout=60)[0]


@contextmanager
def following(run: Path, *options: str, environment: dict[str, str] = NO_SLURM) -> Iterator[Follower]:
    command = [SLURMKIT, "logs", run, "--follow", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        deadline = Timer(120, process.kill)  # so that a line that never comes ends the test
        deadline.start()
        try:
            yield Follower(process)
        finally:
            deadline.cancel()
            process.kill()


def logs(run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [SLURMKIT, "logs", run, *options]
    return subprocess.run(command, env=NO_SLURM, capture_output=True, text=True, timeout=60)


def test_tail_reads_whole_lines_of_a_late_replaced_or_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "driver.log"
    tail = Tail(path)
    assert list(tail.read()) == []
    with path.open("ab", buffering=0) as file:
        file.write("one\nhalf é".encode()[:-1])
        assert list(tail.read()) == ["one"]
        file.write("é".encode()[-1:] + b"\n\xff\n")
        assert list(tail.read()) == ["half é", "\ufffd"]
        file.write(b"begun")
        assert list(tail.read()) == []
        path.rename(tmp_path / "driver.log.1")
        file.write(b" and ended\nlost")
        assert list(tail.read()) == ["begun and ended"]
        path.write_text("new\n")
        assert list(tail.read()) == ["lost", "new"]
    path.write_text("")
    assert list(tail.read()) == []
    path.write_text("cut")
    assert list(tail.read()) == []
    assert list(tail.rest()) == ["cut"]


@pytest.mark.parametrize("last", [0, 1, 3, 200_000, 300_000])
@pytest.mark.parametrize("unfinished", ["", "unfinished"])
def test_the_last_lines_are_found_from_the_end_of_a_long_file(tmp_path: Path, last: int, unfinished: str) -> None:
    path = tmp_path / "driver.log"
    lines = [f"line {number}" for number in range(250_000)]
    path.write_text("\n".join(lines) + "\n" + unfinished)
    tail = Tail(path, last)
    shown = max(0, last - bool(unfinished))
    assert list(tail.read()) == lines[max(0, len(lines) - shown) :]
    assert list(tail.rest()) == [unfinished] * bool(unfinished)


def test_follow_continues_with_the_next_attempt_and_reports_the_runs_end(tmp_path: Path) -> None:
    run = tmp_path / "t"
    first = make_attempt(run, "12.0", nodes="node[1-2]")
    (run / "run.json").write_text(json.dumps({"identity": {}, "attempts": [{"job_id": "12"}]}))
    (first / "driver.log").write_text("".join(f"{number}\n" for number in range(5)))
    (first / "next").write_text("14\n")
    with following(run, "--json", "-n", "2") as follower:
        assert [follower.row() for _ in range(3)] == [
            (1, "slurmkit", "attempt 1 (job 12) on node[1-2]"),
            (1, "driver", "3"),
            (1, "driver", "4"),
        ]
        with (first / "driver.log").open("a") as log:
            log.write("whole\nno line br")
            log.flush()
            assert follower.row() == (1, "driver", "whole")
            log.write("eak at the end")
        end(first, 75, reason="node node2: its raylet died", goes_on=True)
        assert follower.row() == (1, "driver", "no line break at the end")
        assert follower.row() == (1, "slurmkit", "attempt 1 ended with exit code 75: node node2: its raylet died")
        assert "follow-up job 14" in follower.row()[2]
        # However few lines were asked for, what is new is shown as a whole.
        second = make_attempt(tmp_path / "elsewhere", "14.0", nodes="node[3-4]", previous="12")
        (second / "driver.log").write_text("".join(f"again {number}\n" for number in range(5)))
        second = second.rename(run / "attempts/14.0")
        assert [follower.row() for _ in range(6)] == [
            (2, "slurmkit", "attempt 2 (job 14) on node[3-4]"),
            *((2, "driver", f"again {number}") for number in range(5)),
        ]
        end(second, 0, reason="trained")
        assert [json.loads(line)["text"] for line in follower.rest().splitlines()] == ["t is done, exit code 0"]
        assert follower.process.returncode == 0
    # One attempt alone, by its number, its job and its folder.
    for attempt in ("1", "12", "12.0"):
        done = logs(run, "--attempt", attempt, "-n", "1", "--follow")
        assert done.stdout == "no line break at the end\n"
        assert done.stderr.endswith("slurmkit: attempt 1 ended with exit code 75: node node2: its raylet died\n")
    done = logs(run, "--attempt", "3")
    assert done.returncode == 2
    assert "attempt 1 (job 12) on node[1-2], attempt 2 (job 14) on node[3-4]" in done.stderr


def test_logs_shows_job_output_and_failed_node_logs_if_no_command_started(tmp_path: Path) -> None:
    run = tmp_path / "t"
    folder = make_attempt(run, "12.0")
    (run / "slurm-12.out").write_text("slurmkit: the command did not finish\n")
    for node in ("node1", "node2", "node10"):
        (folder / f"node-{node}.log").write_text(f"first of {node}\nlast of {node}\n")
    (folder / "bringup/failed.node2").write_text("no Ray\n")
    (folder / "ray-node2").mkdir()
    (folder / "ray-node2/raylet.out").touch()
    end(folder, 75, reason="node node2: no Ray")
    done = logs(run, "-n", "1")
    assert done.stdout == "slurmkit: the command did not finish\nlast of node2\n"
    assert done.stderr.endswith("slurmkit: t is failed, exit code 75: node node2: no Ray\n")
    # Each node's own log.
    assert logs(run, "--node", "all", "-n", "1").stdout == "".join(
        f"{node}: last of {node}\n" for node in ("node1", "node2", "node10")
    )
    done = logs(run, "--node", "node2", "--all")
    assert done.stdout == "first of node2\nlast of node2\n"
    assert f"Ray's logs of node2 are in {folder}/ray-node2: raylet.out\n" in done.stderr
    done = logs(run, "--node", "node3")
    assert done.returncode == 2
    assert "attempt 1 has no log of node node3, but of node1, node2, node10" in done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é漢🙂\tx", "plain é漢🙂\tx"),
        ("\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m\x1b[0m"),
        ("a\x1b[2J\x1b[10;10Hb\x1b[?1049hc", "abc"),
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c", "abc"),
        ("a\x1bPq#0\x1b\\b\x1bcc\x1b(0d\x1b7e", "abcde"),
        ("a\x9b2Jb\x9d0;x\x9cc\x07\x08\x00\x0e", "a2Jb0;xc"),
        ("a\x1b[31", "a31"),
        ("\r 10%|#   |\r100%|####|\r", "100%|####|"),
    ],
)
def test_on_a_terminal_colours_stay_and_nothing_else_acts(text: str, shown: str) -> None:
    assert for_terminal(text) == shown


def test_the_terminal_gets_what_is_safe_and_a_pipe_what_was_written(tmp_path: Path) -> None:
    folder = make_attempt(tmp_path / "t", "12.0")
    (folder / "driver.log").write_bytes(b"a\x1b[2Jb\n")
    end(folder, 0)
    assert logs(tmp_path / "t").stdout == "a\x1b[2Jb\n"
    ours, its = pty.openpty()
    subprocess.run([SLURMKIT, "logs", tmp_path / "t"], env=NO_SLURM, stdout=its, timeout=60, check=True)
    assert os.read(ours, 1000) == b"ab\r\n"


def test_closed_output_pipe_ends_logs_quietly_even_without_new_lines(tmp_path: Path) -> None:
    folder = make_attempt(tmp_path / "t", "12.0")
    (folder / "driver.log").write_text("line\n" * 100_000)
    for options in (["--all"], ["--follow", "-n", "1"]):
        script = '"$@" | "$0" -n 1; exit "${PIPESTATUS[0]}"'
        command = [which("bash"), "-c", script, which("head"), SLURMKIT, "logs", tmp_path / "t", *options]
        done = subprocess.run(command, env=NO_SLURM, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "line\n")
        assert "Error" not in done.stderr


def test_an_interrupt_ends_it_with_130_and_without_a_traceback(tmp_path: Path) -> None:
    folder = make_attempt(tmp_path / "t", "12.0")
    (folder / "driver.log").write_text("line\n")
    with following(tmp_path / "t") as follower:
        assert follower.line() == "line"
        follower.process.send_signal(signal.SIGINT)
        out, err = follower.process.communicate(timeout=60)
    assert (follower.process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def test_follow_waits_for_a_queued_job_with_its_reason_until_the_end(cluster: Cluster, shared_path: Path) -> None:
    submit = ["submit", "--name", "t", "--set", "sbatch.hold=true", "--set", "ray.num_cpus=1"]
    done = cluster.slurmkit(shared_path, *submit, "--", "bash", "-c", "echo from the command; exit 7")
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.split()[1]
    run = shared_path / "results/t"
    seen = cluster.slurmkit(shared_path, "logs", "t")
    assert (seen.returncode, seen.stdout) == (0, "")
    assert seen.stderr.startswith("slurmkit: t is queued: held by its user")
    with following(run, "--json", environment=cluster.environment) as follower:
        row = json.loads(follower.line())
        assert (row["attempt"], row["job_id"], row["source"]) == (None, job_id, "slurmkit")
        assert row["text"].startswith("t is queued: held by its user")
        cluster.ask("scontrol", "release", job_id)
        rows = [json.loads(line) for line in follower.rest().splitlines()]
    assert [row["text"] for row in rows if row["source"] == "driver"] == ["from the command"]
    assert rows[-1]["text"].startswith("t is failed, exit code 7")
    assert rows[-1]["attempt"] == 1
