"""What a driver does when it is asked to leave, and when what it needs is gone."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slurmkit.errors import Failure, NodeFailure
from slurmkit.generation.actors import together
from tests.support.driver import TINY, ended, last_logged, processes_of, run, start, titled, two_ray_nodes, until
from tests.support.requirements import missing

LONG = "grpo.max_num_steps=100000"


@pytest.mark.ray
@pytest.mark.faults
def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    driver = start(tmp_path, TINY, "policy.from_scratch.supervised_steps=100000")
    assert driver.stdout is not None
    assert driver.stdout.readline() == "importing torch and Ray\n"
    assert driver.stdout.readline().startswith("making a model")
    driver.terminate()
    left = ended(driver, tmp_path, timeout=60)
    assert (left.code, left.errors) == (85, "")
    assert left.output == "interrupted before a step was finished: there is nothing to save\n"


@pytest.mark.ray
@pytest.mark.faults
def test_without_checkpoints_an_interrupt_says_that_nothing_is_saved(tmp_path: Path) -> None:
    driver = start(tmp_path, TINY, LONG, "checkpointing.enabled=false", new_session=True)
    until(lambda: last_logged(tmp_path) > 0, driver)
    # Ray's processes are not in the group, as TERM or USR2 would end them before the driver has all from the actors.
    ray = [each for each in processes_of(driver) if each.name() in ("raylet", "gcs_server")]
    assert [os.getpgid(each.pid) == driver.pid for each in ray] == [False, False]
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    left = ended(driver, tmp_path, timeout=60)
    assert (left.code, left.errors) == (85, "")
    step = last_logged(tmp_path)
    assert left.output.endswith(f"interrupted after step {step}: nothing is saved, as checkpointing.enabled is false\n")


@pytest.mark.ray
@pytest.mark.faults
def test_a_second_signal_ends_a_driver_whose_save_cannot_be_finished(tmp_path: Path) -> None:
    driver = start(tmp_path, TINY, LONG)
    until(lambda: last_logged(tmp_path) > 0, driver)
    processes = processes_of(driver)
    titled(processes, "ray::PolicyWorker").suspend()
    for number in (signal.SIGTERM, signal.SIGUSR2):  # Slurm's own, and what it was asked to send: the same wish
        driver.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(2)
    driver.terminate()
    assert ended(driver, tmp_path, timeout=60).code == 128 + signal.SIGTERM
    _, left = psutil.wait_procs(processes, timeout=30)
    assert not left


@pytest.mark.ray
@pytest.mark.faults
def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        missing("a file system of a given size needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        overrides = (LONG, "checkpointing.save_period=1", "checkpointing.keep_top_k=null")
        done = run(tmp_path / "run", TINY, *overrides)
        assert done.code == 1
        (message,) = re.findall(r"^error: .*$", done.errors, re.MULTILINE)
        saved = max(int(path.name[5:]) for path in (tmp_path / "run").glob("step_*"))
        expected = rf"error: {tmp_path}/run/step_{saved + 1} cannot be saved, with \d\.\d MiB left on its disk: .*"
        assert re.fullmatch(expected + rf"; step_{saved} stays as it is", message)
        assert not list((tmp_path / "run").glob(".step_*"))
        assert "Traceback" not in done.errors
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path], check=True)
        again = run(tmp_path / "run", TINY, f"grpo.max_num_steps={saved + 1}")
        assert again.code == 0, again.errors
        assert f"going on after step {saved}" in again.output
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.ray
@pytest.mark.faults
def test_an_actor_that_ray_kills_for_memory_is_named_with_the_figures(tmp_path: Path) -> None:
    done = run(tmp_path, TINY, RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100")
    assert done.code == 75
    (message,) = re.findall(r"^error: .*$", done.errors, re.MULTILINE)
    assert re.search(r"^error: (policy rank|engine) 0 on node \S+ died before or during \w+\(\): ", message)
    assert re.search(r"low on memory.* was [\d.]+GB used / [\d.]+GB limit", message)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    with two_ray_nodes(tmp_path) as nodes:
        yield nodes


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.nightly
def test_a_lost_node_is_named_and_what_is_left_goes_on_until_ray_is_lost(
    two_nodes: tuple[str, list[psutil.Process]], tmp_path: Path
) -> None:
    address, processes = two_nodes
    raylets = sorted((each for each in processes if each.name() == "raylet"), key=lambda each: each.create_time())
    folder = tmp_path / "run"

    driver = start(folder, TINY, LONG, "cluster.num_nodes=2", RAY_ADDRESS=address)
    until(lambda: (folder / "step_3").exists(), driver)
    raylets[1].kill()
    lost = ended(driver, folder, timeout=90)
    assert lost.code == 75, lost.errors
    assert re.search(r"^error: (policy rank|engine) [01] on node \S+ (died|failed)", lost.errors, re.MULTILINE)
    assert "Traceback" not in lost.errors.partition("error: ")[2]
    saved = max(int(path.name[5:]) for path in folder.glob("step_*"))

    driver = start(folder, TINY, LONG, RAY_ADDRESS=address)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "importing torch and Ray\n"
    assert driver.stdout.readline().startswith(f"going on after step {saved}, from ")
    until(lambda: (folder / f"step_{saved + 3}").exists(), driver)
    next(each for each in processes if each.name() == "gcs_server").kill()
    start_of_end = time.monotonic()
    lost = ended(driver, folder, timeout=90)
    assert lost.code == 75, lost.errors
    (message,) = re.findall(r"^error: .*$", lost.errors, re.MULTILINE)
    assert re.fullmatch(rf"error: Ray's control service at {address} is gone: .*", message)
    assert time.monotonic() - start_of_end < 55  # else Ray has ended the driver, without a word of ours


def test_a_lost_node_is_the_reason_even_where_another_rank_raises_first() -> None:
    async def raises_at_once() -> None:
        raise Failure("rank 0: connection closed by peer")

    async def is_found_dead_later() -> None:
        await asyncio.sleep(0.3)
        raise NodeFailure("rank 1 died")

    with pytest.raises(NodeFailure, match="rank 1 died"):
        asyncio.run(together(raises_at_once(), is_found_dead_later()))
    with pytest.raises(Failure, match="rank 0"):
        asyncio.run(together(raises_at_once(), raises_at_once()))
