"""A run that is interrupted, however rudely, goes on as if it had not been; one that would not is refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from random import Random
from time import sleep
from typing import Any

import pytest

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import UserError
from slurmkit.grpo.checkpoint import CONFIG_FILE, Checkpoints, TrainerState
from slurmkit.grpo.metrics import RunLog
from slurmkit.grpo.resume import starting_point
from tests.support.driver import (
    TINY,
    Run,
    all_end,
    does,
    ended,
    last_logged,
    processes_of,
    run,
    start,
    titled,
    until,
    without_times,
)
from tests.support.requirements import SLURMKIT
from tests.support.tiny_model import make_tiny_model, tiny_config
from tests.support.wandb_files import records

WANDB = ("logger.wandb_enabled=true", "logger.wandb.mode=offline")


class Attempts:
    """One run, attempt after attempt, each ended at another moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = Random(20261122)

    def start(self, after_step: int) -> subprocess.Popen[str]:
        before = self.metrics
        driver = start(self.folder, TINY, *WANDB, new_session=True)
        until(lambda: self.metrics != before, driver)  # it has taken back what is after its checkpoint
        until(lambda: last_logged(self.folder) >= after_step, driver)
        self.others = processes_of(driver)
        raylet = next(" ".join(each.cmdline()) for each in self.others if each.name() == "raylet")
        self.ray_folder = re.search(r"/tmp/slurmkit-\w+", raylet)[0]
        return driver

    def until(self, title: str, driver: subprocess.Popen[str]) -> None:
        actor = titled(self.others, title.partition(".")[0])
        until(lambda: does(actor, title), driver)

    def die(self, driver: subprocess.Popen[str], *, alone: bool, within: float = 0.02) -> None:
        """SIGKILL for the driver, and for its Ray unless it dies `alone`, which Ray does not survive for long."""
        sleep(self.rng.uniform(0, within))
        driver.kill()
        for each in self.others if not alone else ():
            each.kill()
        driver.communicate(timeout=60)
        for each in self.others:
            if each.is_running():
                each.kill()
        shutil.rmtree(self.ray_folder)

    @property
    def metrics(self) -> tuple[int, int] | None:
        path = self.folder / "metrics.jsonl"
        return (path.stat().st_ino, path.stat().st_size) if path.exists() else None

    @property
    def run_id(self) -> str:
        return (self.folder / "wandb" / "run_id").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight steps without interruption."""
    done = run(tmp_path_factory.mktemp("whole") / "run", TINY)
    assert done.code == 0, done.errors
    return done


@pytest.mark.faults
@pytest.mark.nightly
def test_a_run_killed_repeatedly_has_the_metrics_of_an_uninterrupted_run(whole: Run, tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "run")
    folder = attempts.folder

    # In the middle of the first checkpoint, with all of its processes: there is nothing to go on from.
    driver = attempts.start(after_step=0)
    until(lambda: (folder / ".step_3.unfinished").exists(), driver)
    attempts.die(driver, alone=False, within=0.0)
    assert not list(folder.glob("step_*"))
    run_id = attempts.run_id

    # The driver alone, in an update.
    driver = attempts.start(after_step=4)
    attempts.until("ray::PolicyWorker.update", driver)
    attempts.die(driver, alone=True)

    # In order, in a rollout, by a signal to the whole process group.
    driver = attempts.start(after_step=4)
    attempts.until("ray::TorchEngine.collect", driver)
    os.killpg(driver.pid, signal.SIGUSR2)
    left = ended(driver, folder)
    finished = last_logged(folder)
    assert (left.code, left.errors) == (85, "")
    assert "going on after step 3" in left.output
    assert left.output.endswith(f"interrupted after step {finished}: everything is saved in step_{finished}\n")
    assert exit_code_in_wandb(folder) == 0
    saved = json.loads((folder / f"step_{finished}" / "trainer.json").read_text())["metrics"]
    assert saved == {k: v for k, v in logged(folder, finished).items() if k not in ("step", "last_step")}

    # A step is logged, its checkpoint is not there yet.
    driver = attempts.start(after_step=finished)
    until(lambda: last_logged(folder) >= 6, driver)
    attempts.die(driver, alone=True, within=0.0)

    # In a rollout, rudely.
    driver = attempts.start(after_step=7)
    attempts.until("ray::TorchEngine.collect", driver)
    attempts.die(driver, alone=False)

    last = run(folder, TINY, *WANDB)
    assert last.code == 0, last.errors
    assert "going on after step 6" in last.output
    assert without_times(folder) == without_times(whole.folder)
    assert sum(line.get("train:grad_norm", 0) > 0 for line in without_times(folder)) >= 4
    manifests = [json.loads((path / "step_8" / "manifest.json").read_text()) for path in (folder, whole.folder)]
    assert manifests[0]["model/model.safetensors"] == manifests[1]["model/model.safetensors"]
    assert not list(folder.glob(".*"))
    assert {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")} == {run_id}


@pytest.mark.faults
def test_slurmkit_run_ends_its_training_when_killed_and_resumes_at_once(whole: Run, tmp_path: Path) -> None:
    command = [SLURMKIT, "run", "--config", TINY, "--name", "x"]
    folder = tmp_path / "results/x"
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: last_logged(folder) >= 4, first)
    training = processes_of(first)
    assert any(each.name() == "raylet" for each in training)
    os.killpg(first.pid, signal.SIGKILL)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    all_end(training, seconds=0)
    assert again.returncode == 0, again.stderr
    assert "waiting up to 60 s until its processes have ended" in again.stdout
    log = (folder / "attempts/local-2/driver.log").read_text().splitlines()
    assert log[0] == "importing torch and Ray"
    assert log[1].startswith("going on after step 3")
    assert log[2:4] == ["starting Ray", f"loading {folder}/step_3/model (policy ranks: 1, engines: 1)"]
    assert without_times(folder) == without_times(whole.folder)


def logged(folder: Path, step: int) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == step)


def exit_code_in_wandb(folder: Path) -> int:
    """What the newest attempt told W&B of its end."""
    (path,) = max((folder / "wandb").glob("offline-run-*"), key=os.path.getmtime).glob("*.wandb")
    for record in records(path):
        if record.WhichOneof("record_type") == "exit":
            return int(record.exit.exit_code)
    raise AssertionError("W&B was not told")


def checkpoint(folder: Path, step: int, config: TrainConfig | None = None) -> Path:
    """A checkpoint of a run under `config`; None is of the time when it was not saved."""

    async def write(path: Path) -> None:
        if config is not None:
            (path / CONFIG_FILE).write_text(json.dumps(config.model_dump(mode="json")))

    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder, tiny_config(folder).checkpointing)
    return asyncio.run(checkpoints.save(TrainerState(step, 2 * step, step, 0, "digest", {}), write))


def found(folder: Path, resume: str | Path = "auto", **sections: dict[str, Any]) -> str | None:
    """The folder of the checkpoint that a run in `folder` starts from."""
    sections["checkpointing"] = {"checkpoint_dir": str(folder), "resume": str(resume)}
    config = tiny_config(folder, **sections)
    point = starting_point(Checkpoints(folder, config.checkpointing), config)
    return None if point is None else str(point[0].relative_to(folder.parent))


def test_where_a_run_starts_is_what_resume_says(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert found(run) is None
    assert found(run, "never") is None
    for step in (2, 4):
        checkpoint(run, step, tiny_config(run))
    assert found(run) == "run/step_4"
    assert found(run, run / "step_4") == "run/step_4"
    assert found(tmp_path / "other", run / "step_2") == "run/step_2"


@pytest.mark.parametrize("resume", ["never", "run/step_2", "other/step_9"])
def test_checkpoints_that_stand_are_never_overwritten(
    tmp_path: Path, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    checkpoint(tmp_path / "other", 9, tiny_config(run))
    for step in (2, 4):
        checkpoint(run, step, tiny_config(run))
    value = resume if resume == "never" else tmp_path / resume
    monkeypatch.delenv("SK_ATTEMPT_DIR", raising=False)
    with pytest.raises(UserError, match=r"run holds .*step_4, which (starting anew|going on from .*) would overwrite"):
        found(run, value)
    # The next attempt of a run that began so goes on with what the attempts before it have made.
    monkeypatch.setenv("SK_ATTEMPT_DIR", str(tmp_path))
    (tmp_path / "start.json").write_text('{"job_id": "7", "attempt": 2, "previous": "6"}')
    assert found(run, value) == "run/step_4"
    expected = None if resume == "never" else resume
    assert found(tmp_path / "killed at once", value) == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "is no checkpoint, as it holds no manifest.json"),
        (lambda folder: (folder / CONFIG_FILE).unlink(), "is damaged: config.json is missing"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{}"), "is damaged: config.json is not what was written"),
        (lambda folder: shutil.rmtree(folder), "is no checkpoint"),
    ],
)
def test_a_checkpoint_that_was_named_is_not_passed_over(tmp_path: Path, damage: Any, message: str) -> None:
    folder = checkpoint(tmp_path / "run", 2, tiny_config(tmp_path))
    damage(folder)
    with pytest.raises(UserError, match=message):
        found(tmp_path / "other", folder)


def test_another_training_is_refused_with_all_that_is_other(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint(run, 2, tiny_config(run))
    other = {
        "grpo": {"seed": 7, "num_prompts_per_step": 2, "num_generations_per_prompt": 2, "max_num_steps": 3},
        "loss_fn": {"ratio_clip_max": 0.3},
        "cluster": {"num_nodes": 2, "gpus_per_node": 0},
        "logger": {"wandb_enabled": True},
    }
    with pytest.raises(UserError) as refused:
        found(run, **other)
    assert str(refused.value).splitlines() == [
        "grpo.seed: the checkpoint step_2 was trained with 42, the configuration says 7",
        "loss_fn.ratio_clip_max: the checkpoint step_2 was trained with 0.2, the configuration says 0.3",
        "Put it back, or give the run a name and directory of its own",
    ]
    del other["loss_fn"], other["grpo"]["seed"]
    assert found(run, **other) == "run/step_2"


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    run, model = tmp_path / "run", make_tiny_model(tmp_path / "model")
    policy = tiny_config(run).policy.model_dump() | {"model_name": str(model), "from_scratch": None}
    folder = checkpoint(run, 2, tiny_config(run, policy=policy))
    shutil.copytree(model, folder / "model")
    assert found(run, policy=policy) == "run/step_2"
    changed = json.loads((model / "config.json").read_text()) | {"hidden_size": 48}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"policy.model_name: .* has hidden_size 48 now, the checkpoint step_2 has 32"):
        found(run, policy=policy)


def test_a_checkpoint_without_its_configuration_is_used_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "run", 2)
    assert found(tmp_path / "run", grpo={"seed": 7, "num_prompts_per_step": 2, "num_generations_per_prompt": 2})
    assert "does not say what it was trained with: nothing is compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    "after", ["", '{"step": 3}\n{"step": 4}\n', '{"step": 3, "tra', "\0\0\0\0", '{"step": 2, "tra\n{"step": 2}\n']
)
def test_lines_after_the_checkpoint_are_taken_back(tmp_path: Path, after: str) -> None:
    kept = '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + after)
    with RunLog(tmp_path, tiny_config(tmp_path), last_step=8, resume_after=2) as log:
        assert (tmp_path / "metrics.jsonl").read_text() == kept
        log.write(3, {"train:loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == kept + '{"step": 3, "last_step": 8, "train:loss": 0.5}\n'
