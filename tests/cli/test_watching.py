"""The commands that look at runs, as a user calls them, without Slurm: names, tables, JSON, exit codes, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.requirements import SLURMKIT
from tests.support.run_directories import Made

# No sbatch there.
ENVIRONMENT = {**os.environ, "PATH": str(SLURMKIT.parent), "COLUMNS": "200"}
COMMANDS = ("status", "ls", "top", "cancel", "wait", "usage")


def slurmkit(here: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SLURMKIT, *arguments], cwd=here, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def runs(here: Path) -> Path:
    """Four runs: one that runs, one that is done, one that failed two days ago, one in the queue."""
    results = here / "results"
    running = Made(results / "grpo-seven").record("4711").start("4711.0", 300).alive("4711.0", -60)
    running.steps({"train:reward_mean": 0.25, "time:step": 6.0, "val:accuracy": 0.5})
    Made(results / "grpo-done").record("13").start("13.0", 900).end("13.0", 500, 0)
    Made(results / "old").record("14").start("14.0", 2e5).end("14.0", 1.9e5, 7, "the command failed with 7")
    Made(results / "queued").record("15")
    return here


def test_status_lists_active_and_recent_runs_in_columns_and_ls_lists_all(runs: Path) -> None:
    done = slurmkit(runs, "status")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.sub(r"5:\d\d/", "5:XX/", line) for line in done.stdout.splitlines()]
    waits = lines.pop()
    assert lines == [
        "RUN         STATE    JOB   NODES      ELAPSED       STEP  REWARD  ACCURACY  LEFT  WHY",
        "grpo-done   done     13    node[1-2]  6:40",
        "grpo-seven  running  4711  node[1-2]  5:XX/1:00:00  1/10  0.250   0.500     0:54",
    ]
    assert waits.split(maxsplit=3) == [
        "queued",
        "queued",
        "15",
        "job 15, as far as its files tell: Slurm was not asked",
    ]
    assert waits.index("job 15") == lines[0].index("WHY")
    listed = slurmkit(runs / "results", "ls", ".").stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["RUN", "grpo-done", "grpo-seven", "old", "queued"]
    assert "the command failed with 7" in listed
    assert slurmkit(runs, "top", "--once").stdout.splitlines()[:2] == done.stdout.splitlines()[:2]


@pytest.mark.parametrize("name", ["grpo-seven", "results/grpo-seven/", "4711", "4711_3"])
def test_a_run_is_known_by_its_name_its_path_and_its_job_s_id(runs: Path, name: str) -> None:
    done = slurmkit(runs, "status", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"run            grpo-seven\nstate          running\nrun directory  {runs}/results/")
    assert "step           1/10  reward 0.250  accuracy 0.500  0:54 left\n" in done.stdout


def test_the_results_folder_is_where_submit_puts_runs(runs: Path) -> None:
    (runs / "results").rename(runs / "elsewhere")
    (runs / "slurmkit.yaml").write_text("results_dir: elsewhere\n")
    (runs / "below").mkdir()
    assert slurmkit(runs / "below", "status", "old").returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_run_is_one_error_with_the_nearest_names(runs: Path, command: str) -> None:
    if command in ("ls", "top"):
        done = slurmkit(runs, command, "nowhere")
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        return
    done = slurmkit(runs, command, "grpo-sevn")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: grpo-sevn: no run of that name in {runs}/results, no run directory, and no job of one; "
        "the nearest are grpo-seven, grpo-done\n"
    )


def test_details_name_every_attempt_and_what_ended_it(runs: Path) -> None:
    made = Made(runs / "results/hard").record("20").start("20.0", 900, max_attempts=5)
    made.end("20.0", 500, 75, "node node2: its raylet died", bad_nodes=["node2"], goes_on=True)
    made.put("20.0", "next", "21").start("21.0", 400, previous="20", nodes="node[3-4]").end("21.0", 90, 0)
    text = slurmkit(runs, "status", "hard").stdout
    assert re.search(
        r"^attempts +2 of 5 at most\n +1  20\.0  node\[1-2\]  \S+ \S+  6:40  (.*)\n +2  21\.0  ", text, re.M
    )
    assert "exit code 75: node node2: its raylet died; bad nodes: node2\n" in text


def test_json_has_the_same_keys_for_every_run_and_in_every_command(runs: Path) -> None:
    found = [json.loads(slurmkit(runs, *words, "--json").stdout) for words in (["ls"], ["status"], ["top", "--once"])]
    assert [len(states) for states in found] == [4, 3, 3]
    found.append(json.loads(slurmkit(runs, "status", "old", "--json").stdout))
    found.append([json.loads(slurmkit(runs, "wait", "old", "--json").stdout)])
    cancelled = json.loads(slurmkit(runs, "cancel", "old", "--json").stdout)
    assert [state.pop("cancelled") for state in cancelled] == [[]]
    keys = {frozenset(state) for states in [*found, cancelled] for state in states}
    names = "name path state reason job_id next nodes started ended elapsed limit step last_step reward accuracy left "
    names += "checkpoint code attempts max_attempts"
    assert keys == {frozenset(names.split())}
    (seven,) = [state for state in found[1] if state["name"] == "grpo-seven"]
    assert (seven["state"], seven["reward"], seven["limit"]) == ("running", 0.25, 3600.0)


@pytest.mark.parametrize(
    ("run", "code"), [("grpo-done", 0), ("old", 7), ("cancelled", 143), ("saved", 85), ("lost", 1), ("queued", 124)]
)
def test_wait_ends_with_the_run_s_exit_code(runs: Path, run: str, code: int) -> None:
    Made(runs / "results/cancelled").record("16").start("16.0", 9).end("16.0", 5, 143, cancelled=True)
    Made(runs / "results/saved").record("17").start("17.0", 9).end("17.0", 5, 85, "interrupted after step 3")
    Made(runs / "results/lost").record("18").start("18.0", 999).alive("18.0", 900)
    done = slurmkit(runs, "wait", run, "--timeout", "0.1" if run == "queued" else "30")
    assert done.returncode == code
    assert ("is queued after 0.1 s" in done.stderr) == (run == "queued")


def test_a_run_that_has_ended_is_not_cancelled(runs: Path) -> None:
    before = sorted(runs.rglob("*"))
    done = slurmkit(runs, "cancel", "old", "grpo-done")
    assert (done.returncode, done.stdout) == (0, "old: has ended before: failed\ngrpo-done: has ended before: done\n")
    assert sorted(runs.rglob("*")) == before
    done = slurmkit(runs, "cancel", "queued")
    assert (done.returncode, done.stderr.count("there is no Slurm here")) == (1, 1)


def test_cancelling_a_local_run_ends_its_process_and_no_other(here: Path) -> None:
    both = {}
    for name in ("one", "two"):
        both[name] = subprocess.Popen([SLURMKIT, "run", "--name", name, "--", "sleep", "300"], cwd=here)
        log = here / f"results/{name}/attempts/local-1/driver.log"
        deadline = time.monotonic() + 60
        while not log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        made = Made(here / "results" / name).record(one="local-1")
        made.start("local-1", 0, nodes=socket.gethostname(), pid=both[name].pid, started=time.time())
    try:
        done = slurmkit(here, "cancel", "one")
        assert f"process {both['one'].pid}" in done.stdout, done.stderr
        assert both["one"].wait(60) != 0
        assert both["two"].poll() is None
    finally:
        for process in both.values():
            process.send_signal(signal.SIGINT)
            process.wait(60)


def test_looking_loads_nothing_that_only_a_terminal_needs(runs: Path) -> None:
    code = "import sys\nfrom slurmkit.cli.main import main\ntry:\n    main()\nfinally:\n    print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "status"], cwd=runs, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "slurmkit.run.state" in loaded
    assert not loaded & {"rich", "yaml", "hydra", "omegaconf", "torch", "ray", "pydantic"}


@pytest.fixture
def screen(runs: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`slurmkit top` on a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [SLURMKIT, "top"],
        cwd=runs,
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(theirs)
    yield process, ours
    process.kill()
    process.communicate()
    os.close(ours)


def read_until(terminal: int, text: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 65536)
    return seen


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("Ctrl-C", 130)])
def test_top_draws_the_runs_anew_and_leaves_the_terminal_as_it_was(
    runs: Path, screen: tuple[subprocess.Popen[bytes], int], key: str, code: int
) -> None:
    process, terminal = screen
    read_until(terminal, b"grpo-seven")
    Made(runs / "results/appeared").record("16")
    read_until(terminal, b"appeared")
    if key == "q":
        os.write(terminal, b"q")
    else:
        process.send_signal(signal.SIGINT)
    read_until(terminal, b"\x1b[?1049l")  # back from the other screen
    assert process.wait(60) == code
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sta"], {"status"}),
        (["status", "grpo"], {"grpo-seven", "grpo-done"}),
        (["cancel", "47"], {"4711"}),
        (["wait", "old", "--ti"], {"--timeout"}),
    ],
)
def test_bash_completes_commands_options_runs_and_job_ids_without_slurm(
    runs: Path, words: list[str], expected: set[str]
) -> None:
    asked = runs / "bin"
    asked.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol"):
        (asked / name).write_text(f"#!/bin/sh\ntouch '{runs}/asked'\n")
        (asked / name).chmod(0o755)
    script = 'eval "$(slurmkit completion bash)"; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))\n'
    script += '_slurmkit_completion slurmkit; printf "%s\\n" "${COMPREPLY[@]}"'
    path = f"{asked}:{SLURMKIT.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script, "bash", "slurmkit", *words],
        cwd=runs,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert set(done.stdout.split()) == expected, done.stderr
    assert not (runs / "asked").exists()
    for shell in ("zsh", "fish"):
        assert "_SLURMKIT_COMPLETE" in slurmkit(runs, "completion", shell).stdout
