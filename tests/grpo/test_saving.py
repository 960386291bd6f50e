"""Checkpoints are written behind the training: of the step they are of, one at a time, and never silently not."""

from __future__ import annotations

import asyncio
import errno
import json
import queue
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from slurmkit.errors import Failure
from slurmkit.grpo import saving, writer
from slurmkit.grpo.checkpoint import Checkpoints, TrainerState
from slurmkit.grpo.policy_worker import PolicyWorker
from slurmkit.grpo.saving import Deadline, Saver
from tests.support.driver import EVERY_STEP, TINY, Run, ended, last_logged, start, until
from tests.support.requirements import unchanged_environment
from tests.support.tiny_model import make_tiny_model, tiny_config

# In every process that Python starts; only rank 0's writer has a thread of that name.
HELD = """
import os, threading, time
real = os.fsync
def fsync(descriptor):
    while threading.current_thread().name.startswith("checkpoint") and os.path.exists({hold!r}):
        time.sleep(0.01)
    real(descriptor)
os.fsync = fsync
"""


def weights_of(run: Path, step: int) -> str:
    return str(json.loads((run / f"step_{step}" / "manifest.json").read_text())["model/model.safetensors"])


def test_steps_go_on_while_one_is_written_and_who_leaves_waits_for_it(finished: Run, tmp_path: Path) -> None:
    folder, hold = tmp_path / "run", tmp_path / "hold"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HELD.format(hold=str(hold)))
    hold.touch()
    late = ("checkpointing.save_period=1000", "checkpointing.checkpoint_must_save_by='00:00:00:01'")
    driver = start(folder, TINY, *EVERY_STEP, *late, PYTHONPATH=str(tmp_path / "site"))
    until(lambda: last_logged(folder) >= 3, driver)
    assert (folder / ".step_1.unfinished").is_dir()
    assert not list(folder.glob("step_*"))
    driver.send_signal(signal.SIGUSR2)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(2)
    hold.unlink()
    left = ended(driver, folder, timeout=60)
    assert (left.code, left.errors) == (85, "")
    last = last_logged(folder)
    assert left.output.endswith(f"interrupted after step {last}: everything is saved in step_{last}\n")
    # Step 1 is there because of its deadline, once, and holds the weights of step 1, whatever came after.
    assert sorted(int(path.name[5:]) for path in folder.glob("step_*")) == [1, last]
    for step in (1, last):
        assert weights_of(folder, step) == weights_of(finished.folder, step)
    assert not list(folder.glob(".*"))


@pytest.fixture
def fresh(tmp_path: Path) -> Any:
    """A policy of one rank in this process, before its first update."""
    model = make_tiny_model(tmp_path / "start")
    policy = {"model_name": str(model), "from_scratch": None}
    alone = PolicyWorker(tiny_config(tmp_path, policy=policy), 0, 1, threads=1)
    port = alone.open_store("127.0.0.1")
    with unchanged_environment():
        alone.join("127.0.0.1", "127.0.0.1", port)
    alone.load(str(model), None, None, 0)
    yield alone
    distributed.destroy_process_group()


@pytest.fixture
def worker(fresh: PolicyWorker) -> PolicyWorker:
    """The same with moments."""
    move(fresh)
    return fresh


def move(worker: PolicyWorker, by: float = 1.0) -> None:
    """A step of the optimiser with gradients all alike."""
    for parameter in worker._model.parameters():
        parameter.grad = torch.full_like(parameter, by)
    worker._optimizer.step()


def written(worker: PolicyWorker) -> dict[str, str]:
    while (digests := worker.written()) is None:
        threading.Event().wait(0.01)
    return digests


def test_a_checkpoint_holds_the_requested_step_despite_later_updates(
    worker: PolicyWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, real = threading.Event(), writer.write_checked

    def write_checked(*arguments: Any) -> dict[str, str]:
        assert may_write.wait(60)
        return real(*arguments)

    monkeypatch.setattr(writer, "write_checked", write_checked)
    before = {name: tensor.clone() for name, tensor in worker.gather_weights().tensors.items()}
    (tmp_path / "saved").mkdir()
    worker.save(str(tmp_path / "saved"))
    assert worker.written() is None
    move(worker)
    assert any(not torch.equal(before[name], tensor) for name, tensor in worker.gather_weights().tensors.items())
    may_write.set()
    digests = written(worker)
    saved = load_file(tmp_path / "saved" / "model" / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    state = torch.load(tmp_path / "saved" / "optimizer.pt")["state"]
    assert {float(moments["step"]) for moments in state.values()} == {1.0}
    assert [float(moments["exp_avg"].mean()) for moments in state.values()] == pytest.approx([0.1] * len(state))
    assert digests.keys() >= {"optimizer.pt", "model/model.safetensors", "model/config.json"}


def test_a_save_before_the_first_update_does_not_count_as_one(fresh: PolicyWorker, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    fresh.save(str(tmp_path / "saved"))
    written(fresh)
    move(fresh)
    again = fresh._optimizer.state.values()
    fresh.load(str(tmp_path / "start"), None, str(tmp_path / "saved"), 0)
    move(fresh)
    for moments in (again, fresh._optimizer.state.values()):
        assert {float(each["step"]) for each in moments} == {1.0}


def test_weights_that_have_diverged_are_never_saved(worker: PolicyWorker, tmp_path: Path) -> None:
    with torch.no_grad():
        next(worker._model.parameters()).fill_(float("nan"))
    worker.save(str(tmp_path))
    with pytest.raises(FloatingPointError, match="has diverged: weights or moments are not finite"):
        written(worker)
    assert not (tmp_path / "model").exists()


def test_tied_weights_are_copied_and_written_once() -> None:
    live = torch.ones(3)
    copied = writer.apart({"a": live, "b": live, "fresh": (fresh := torch.ones(2))}, [live])
    live += 1
    assert copied["a"].tolist() == [1, 1, 1]
    assert copied["a"].data_ptr() == copied["b"].data_ptr()
    assert copied["fresh"] is fresh


class Ranks:
    """Stands in for the policy: a write that ends when it is told to, or fails."""

    def __init__(self) -> None:
        self.may_end: queue.Queue[OSError | None] = queue.Queue()
        self.begun: list[str] = []

    async def save(self, folder: Path) -> None:
        self.begun.append(folder.name)

    async def written(self) -> dict[str, str]:
        while self.may_end.empty():
            await asyncio.sleep(0.001)
        if (error := self.may_end.get()) is not None:
            raise error
        return {}


class Tokenizer:
    def save(self, folder: Path) -> None:
        folder.mkdir()


def with_saver(folder: Path, use: Callable[[Saver, Ranks], Awaitable[None]]) -> None:
    async def main() -> None:
        ranks: Any = Ranks()
        tokenizer: Any = Tokenizer()
        config = tiny_config(folder)
        checkpoints = Checkpoints(folder, config.checkpointing)
        async with Saver(checkpoints, ranks, tokenizer, config, saved=None, started=0.0) as saver:
            await use(saver, ranks)

    asyncio.run(main())


async def checked(saver: Saver) -> None:
    """The check of one step after the other."""
    while True:
        saver.check()
        await asyncio.sleep(0.001)


def state(step: int) -> TrainerState:
    return TrainerState(step, step, step, 0, "digest", {})


def test_a_save_waits_for_the_previous_one_and_the_metrics_line(tmp_path: Path) -> None:
    async def use(saver: Saver, ranks: Ranks) -> None:
        first = state(1)
        assert "time:checkpoint_write" not in await saver.copy(first)
        ranks.may_end.put(None)
        second = asyncio.create_task(saver.copy(state(2)))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert ranks.begun == [".step_1.unfinished"]  # its line is not in metrics.jsonl
        assert not (tmp_path / "step_1").exists()
        dict.__setitem__(first.metrics, "late", 1.0)  # type: ignore[index]
        saver.logged()
        metrics = await second
        assert ranks.begun == [".step_1.unfinished", ".step_2.unfinished"]
        assert metrics.keys() == {"time:checkpoint_wait", "time:checkpoint_write"}
        assert json.loads((tmp_path / "step_1" / "trainer.json").read_text())["metrics"] == {"late": 1.0}
        assert saver.check() == {}
        saver.logged()
        ranks.may_end.put(None)
        assert await saver.settle() == tmp_path / "step_2"
        assert saver.check().keys() == {"time:checkpoint_write"}
        assert saver.check() == {}

    with_saver(tmp_path, use)


def test_a_failed_write_fails_the_next_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    async def use(saver: Saver, ranks: Ranks) -> None:
        for step, error in ((1, None), (2, OSError(errno.ENOSPC, "No space left on device"))):
            await saver.copy(state(step))
            saver.logged()
            ranks.may_end.put(error)
            if step == 1:
                await saver.settle()
        message = r"step_2 cannot be saved, with .* MiB left on its disk: .*No space left.*; step_1 stays as it is"
        with pytest.raises(Failure, match=message):
            await asyncio.wait_for(checked(saver), 30)
        with pytest.raises(Failure, match=message):  # whoever leaves hears of it, too
            await saver.settle()

    with_saver(tmp_path, use)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step_1"]


def test_a_copy_that_cannot_begin_is_said_at_once(tmp_path: Path) -> None:
    async def use(saver: Saver, ranks: Ranks) -> None:
        with pytest.raises(Failure, match="step_1 cannot be saved"):
            await saver.copy(state(1))

    tmp_path.chmod(0o700)
    (tmp_path / ".step_1.unfinished").write_text("in the way")
    with_saver(tmp_path, use)


def test_one_save_comes_before_its_deadline_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    deadline = Deadline(1000.0, started=0.0)
    deadline.longest_write = 50.0
    asked = []
    for seconds in (200, 100, 300, 200, 200, 100):  # ends at 300, 400, 700, 900, …
        now += seconds
        asked.append(deadline.is_near())
    # After the step that ends at 700 another one of 300 and a write of 50 would be too late.
    assert asked == [False, False, True, False, False, False]
    assert not Deadline(None, started=0.0).is_near()
