"""Answers are compared in processes that may hang, swell and die: a run goes on, and its event loop never waits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurmkit.envs import verifier as module
from slurmkit.envs.verifier import Verdict, Verifier
from slurmkit.errors import UserError

HANGS = r"9^{9^{9^{9}}}"


def processes_of(parent: int) -> list[int]:
    """Verifier processes of a driver, dead or alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            is_child = (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(parent)
        except OSError:
            continue
        if is_child and any(word.endswith(b"verifier_process.py") for word in words):
            found.append(int(entry.name))
    return found


def words_of(process: int) -> list[str]:
    """Its command line."""
    return Path(f"/proc/{process}/cmdline").read_text().split("\0")


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    made = Verifier(2, 2.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def narrow() -> Iterator[Verifier]:
    """One process with little memory and much time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MEMORY", 90 << 20)  # it has 62 MiB as it starts
        made = Verifier(1, 30.0)
        yield made
        made.close()


def compare(verifier: Verifier, *pairs: tuple[str, str]) -> list[Verdict]:
    async def ask() -> list[Verdict]:
        return list(await asyncio.gather(*(verifier.compare(*pair) for pair in pairs)))

    return asyncio.run(ask())


def test_hundreds_at_once_share_two_processes_while_the_event_loop_goes_on(verifier: Verifier) -> None:
    async def ask() -> tuple[list[Verdict], int]:
        pairs = [(rf"\frac{{{2 * number}}}{{2}}", str(number + number % 2)) for number in range(300)]
        asked = asyncio.gather(*(verifier.compare(*pair) for pair in pairs))
        turns = 0
        while not asked.done():
            await asyncio.sleep(0.01)
            turns += 1
        return await asked, turns

    verdicts, turns = asyncio.run(ask())
    assert verdicts == ["right", "wrong"] * 150
    assert turns > 20, "the event loop stood still"
    assert sum("2.0" in words_of(process) for process in processes_of(os.getpid())) == 2
    assert not verifier.failures


def test_an_expression_that_hangs_is_wrong_after_its_time_and_others_go_on(
    verifier: Verifier, capsys: pytest.CaptureFixture[str]
) -> None:
    verifier.failures.clear()
    start = time.monotonic()
    verdicts = compare(verifier, (HANGS, "3"), (r"\frac{1}{4}", "0.25"), *[(HANGS, "3")] * 16)
    assert verdicts == ["timed out", "right", *["timed out"] * 16]
    assert time.monotonic() - start < 20, "each of the same pairs took its time"
    assert verifier.failures == {"timed out": 1}
    assert (
        f"math-verify timed out after 2 s over {HANGS!r} beside '3', which counts as wrong" in capsys.readouterr().out
    )
    assert compare(verifier, (r"\frac{3}{4}", "0.75"), (r"\frac{3}{5}", "0.75")) == ["right", "wrong"]


def test_an_expression_that_would_take_all_memory_does_not(narrow: Verifier) -> None:
    assert compare(narrow, (r"2^{400000000}", "3"))[0] in ("wrong", "crashed")  # it would have 200 MiB
    assert compare(narrow, (r"\frac12", "0.5")) == ["right"]
    for process in processes_of(os.getpid()):
        if "30.0" in words_of(process):
            most = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if "VmPeak" in line)
            assert int(most.split()[1]) <= 90 << 10


@pytest.mark.parametrize(
    "text", ['print("right")', "exit()", '__import__("os")._exit(0)', "true\ntrue", "\x00", "\ud800"]
)
def test_text_that_would_be_a_program_or_an_answer_of_its_own_is_only_text(verifier: Verifier, text: str) -> None:
    before, failures = processes_of(os.getpid()), verifier.failures.copy()
    assert compare(verifier, (text, "34"), (r"\frac{68}{2}", "34")) == ["wrong", "right"]
    assert set(before) <= set(processes_of(os.getpid()))
    assert verifier.failures == failures


def test_a_process_that_is_killed_is_counted_and_replaced(narrow: Verifier, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(narrow, (r"\frac15", "0.2")) == ["right"]
    narrow.failures.clear()

    async def kill_while_it_works() -> Verdict:
        asked = asyncio.ensure_future(narrow.compare(HANGS, "3"))
        await asyncio.sleep(0.5)
        for process in processes_of(os.getpid()):
            if "30.0" in words_of(process):
                os.kill(process, signal.SIGKILL)
        return await asked

    assert asyncio.run(kill_while_it_works()) == "crashed"
    assert narrow.failures == {"crashed": 1}
    assert "math-verify crashed over" in capsys.readouterr().out
    assert compare(narrow, (r"\frac{2}{5}", "0.4")) == ["right"]


def test_what_was_asked_before_is_not_asked_again(verifier: Verifier) -> None:
    pair = (r"\frac{7}{8}", "0.875")
    assert compare(verifier, pair) == ["right"]
    for process in processes_of(os.getpid()):
        os.kill(process, signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert compare(verifier, pair, pair) == ["right", "right"]
        assert time.monotonic() - start < 1
    finally:
        for process in processes_of(os.getpid()):
            os.kill(process, signal.SIGCONT)


def test_an_episode_that_gives_up_does_not_take_the_others_answer(verifier: Verifier) -> None:
    async def ask() -> Verdict:
        first = asyncio.ensure_future(verifier.compare(r"\frac{9}{8}", "1.125"))
        second = asyncio.ensure_future(verifier.compare(r"\frac{9}{8}", "1.125"))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(ask()) == "right"


def test_processes_end_with_their_driver_even_while_they_hang(tmp_path: Path) -> None:
    program = (
        "import asyncio, os\n"
        "from slurmkit.envs.verifier import Verifier\n"
        "verifier = Verifier(2, 2.0)\n"
        "async def ask():\n"
        "    print(await verifier.compare('1/2', '0.5'), flush=True)\n"
        f"    await asyncio.gather(verifier.compare({HANGS!r}, '3'), verifier.compare('1/4', '0.5'))\n"
        "asyncio.run(ask())\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "right\n"
    found = processes_of(driver.pid)
    driver.kill()
    driver.wait()
    assert found
    deadline = time.monotonic() + 15
    while not all(map(is_gone, found)):
        assert time.monotonic() < deadline, "a verifier outlived its driver"
        time.sleep(0.1)


def test_a_process_imports_neither_torch_nor_ours() -> None:
    program = (
        "import runpy, sys, io; sys.argv = ['verifier_process.py', '5', str(2 << 30)]; sys.stdin = io.StringIO()\n"
        f"runpy.run_path({str(Path(module.__file__).with_name('verifier_process.py'))!r}, run_name='__main__')\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} & {'torch', 'ray', 'slurmkit', 'transformers'}\n"
        "sys.exit(', '.join(loaded) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr


def test_without_math_verify_the_run_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"math-verify, which is not installed: slurmkit\[train\]"):
        Verifier(1, 1.0)
