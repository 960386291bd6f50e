"""Whole runs on a private local Ray: what a user starts, and what a user then finds."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.driver import (
    CANARY,
    Run,
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
from tests.support.requirements import REPOSITORY, need_shared_data

ARITHMETIC = REPOSITORY / "examples" / "grpo_arithmetic.yaml"
# A short supervised start: enough for the form of an answer, and for groups that carry signal.
SHORT = (
    "env.arithmetic.num_terms=2",
    "env.arithmetic.demonstration_error=1",
    "policy.from_scratch.supervised_steps=150",
    "grpo.num_prompts_per_step=8",
    "policy.train_global_batch_size=64",
    "policy.train_micro_batch_size=64",
    "grpo.max_val_samples=20",
    "grpo.val_period=2",
    "checkpointing.save_period=2",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder, ARITHMETIC, *SHORT, "grpo.max_num_steps=4")
    assert done.code == 0, done.errors
    return done


def test_metrics_have_one_line_per_step_and_the_agreed_names(whole: Run) -> None:
    assert [line["step"] for line in whole.lines] == [0, 1, 2, 3, 4]
    assert ["val:accuracy" in line for line in whole.lines] == [True, False, True, False, True]
    for line in whole.lines[1:]:
        assert {"train:reward_mean", "train:loss", "time:rollout", "time:update", "time:step"} <= line.keys()
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in line.values())


def test_engines_sample_with_the_policys_weights_after_every_update(whole: Run) -> None:
    errors = whole.values("train:token_mult_prob_error")
    assert len(errors) == 4
    assert max(errors) < 1 + 1e-4
    assert max(whole.values("train:grad_norm")) > 0.01  # and they did change


def test_a_checkpoint_opens_with_transformers_and_has_learned_something(whole: Run) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(whole.folder / name).state_dict()
        for name in ("model", "step_2/model", "step_4/model")
    ]
    assert models[0].keys() == models[2].keys()
    assert any(not torch.equal(models[0][name], models[2][name]) for name in models[0])
    assert any(not torch.equal(models[1][name], models[2][name]) for name in models[1])
    tokenizer = AutoTokenizer.from_pretrained(whole.folder / "step_4" / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2+3="}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|user|>1+2+3=<|end|><|assistant|>"


@pytest.mark.parametrize("name", ["validation_reward", "training"])
def test_the_plots_are_drawn_at_the_end(whole: Run, name: str) -> None:
    assert (whole.folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_steps_that_validate_or_save_were_trained_on_is_kept(whole: Run) -> None:
    assert sorted(path.name for path in (whole.folder / "samples").iterdir()) == ["step_2.jsonl", "step_4.jsonl"]
    lines = [json.loads(line) for line in (whole.folder / "samples/step_2.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    (sample,) = lines[0]["samples"]
    assert "".join(sample["tokens"]).startswith("<|user|>")
    assert sum(sample["mask"]) == sum(value is not None for value in sample["logprobs"]) > 0


def test_wandb_has_the_run_and_nothing_of_the_environment(whole: Run) -> None:
    files = [path for path in (whole.folder / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    for name in (b"val:accuracy", b"val:conversations", b"train:conversations"):
        assert name in content
    assert CANARY.encode() not in content


def test_nothing_temporary_stays(whole: Run) -> None:
    assert not list(whole.folder.glob(".*"))
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in running if str(whole.folder) in " ".join(command)]


@pytest.mark.ray
def test_rows_that_the_model_cannot_solve_end_the_run_with_a_reason(tmp_path: Path) -> None:
    rows = [f"data.{name}.data_path={need_shared_data('gsm8k/test.jsonl')}" for name in ("train", "validation")]
    done = run(
        tmp_path,
        REPOSITORY / "examples" / "grpo_gsm8k.yaml",
        *rows,
        "policy.from_scratch.supervised_steps=0",
        "grpo.max_steps_without_signal=2",
        "grpo.max_val_samples=4",
    )
    assert done.code == 1
    assert done.errors.count("error:") == 1
    assert "error: no group carried signal in 2 steps in a row (grpo.max_steps_without_signal)" in done.errors
    assert "step 1: no group carries signal" in done.output
    assert [line["train:dropped_groups/none_correct"] for line in done.lines[1:]] == [4, 4]
    assert not done.values("train:loss")
    assert "everything up to step 2 is saved" in done.output
    assert (tmp_path / "latest").resolve().name == "step_2"


@pytest.mark.ray
@pytest.mark.faults
def test_a_dead_or_hung_engine_restarts_and_the_metrics_do_not_change(whole: Run, tmp_path: Path) -> None:
    stalls = "policy.generation.stall_timeout_seconds=20"
    driver = start(tmp_path, ARITHMETIC, *SHORT, "grpo.max_num_steps=4", stalls)
    # Once with the weights that it started with, once with those of an update.
    for step, end in ((1, signal.SIGKILL), (2, signal.SIGSTOP)):
        until(lambda step=step: last_logged(tmp_path) >= step - 1, driver)  # type: ignore[misc]
        engine = titled(processes_of(driver), "ray::TorchEngine")
        until(lambda engine=engine: does(engine, "ray::TorchEngine.collect"), driver)  # type: ignore[misc]
        engine.send_signal(end)
    done = ended(driver, tmp_path)
    assert done.code == 0, done.errors
    # Ray prints in between, sometimes in the middle of a line.
    for count, what in ((1, "died"), (2, "has finished nothing for 20 s")):
        assert re.search(rf"engine 0 on node \S+ {what} .*: started again, for the {count}. time of 3", done.output)
    assert done.values("train:engine_restarts")[-1] == 2
    undisturbed, disturbed = without_times(whole.folder), without_times(tmp_path)
    for line in (*undisturbed, *disturbed):
        line.pop("train:engine_restarts", None)
    assert disturbed == undisturbed


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.parametrize("actor", ["policy rank 0", "engine 0"])
def test_the_death_of_an_actor_without_restarts_ends_the_run_with_its_name(tmp_path: Path, actor: str) -> None:
    process = start(tmp_path, ARITHMETIC, *SHORT, "policy.generation.max_restarts=0")
    title = "ray::PolicyWorker" if actor.startswith("policy") else "ray::TorchEngine"
    deadline = time.monotonic() + 200
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [child for child in children if " ".join(child.cmdline()).startswith(title)]
    victim.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert re.search(rf"^error: {actor} on node \S+ died before or during \w+\(\): ", errors, re.MULTILINE)
    assert "Traceback" not in errors


@pytest.mark.ray
def test_a_run_too_large_for_ray_logs_requested_and_available_resources(tmp_path: Path) -> None:
    overrides = ("cluster.num_nodes=2", "cluster.placement_timeout_seconds=2")
    done = run(tmp_path, ARITHMETIC, *SHORT, "policy.from_scratch.supervised_steps=0", *overrides)
    assert done.code == 1
    assert "no room for the run after 2 s: it asks for 2 node(s) with 1 CPU and 0 GPU each" in done.errors
    assert "Ray has 1 node(s)" in done.errors
    assert "Traceback" not in done.errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.num_promts_per_step=4", "unknown key grpo.num_promts_per_step"),
        ("++grpo.num_promts_per_step=4", "the nearest known key is grpo.num_prompts_per_step"),
        ("policy.train_global_batch_size=100", "must divide the 512 samples of a step"),
        ("policy.optimizer.kwargs.lr=fast", "policy.optimizer.kwargs.lr"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_message_and_exit_code_2(
    tmp_path: Path, override: str, message: str
) -> None:
    done = run(tmp_path / "run", ARITHMETIC, override)
    assert done.code == 2
    assert done.errors.startswith("error: ")
    assert message in done.errors
    assert "Traceback" not in done.errors
    assert done.errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_too_few_tasks_for_one_step_are_refused_and_leave_no_files(tmp_path: Path) -> None:
    many = ("grpo.num_prompts_per_step=1024", "policy.train_global_batch_size=16384", "grpo.max_num_epochs=1")
    done = run(tmp_path / "run", ARITHMETIC, *many)
    assert done.code == 2
    assert done.errors.startswith("error: grpo.num_prompts_per_step 1024 is more than the")
    assert not (tmp_path / "run").exists()


def test_a_configuration_is_read_without_importing_what_is_slow() -> None:
    program = (
        "import sys, slurmkit.config, slurmkit.grpo.__main__;"
        "print([name for name in ('torch', 'ray', 'transformers', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


@pytest.mark.ray
@pytest.mark.nightly
def test_the_arithmetic_example_learns(tmp_path: Path) -> None:
    done = run(tmp_path, ARITHMETIC, "grpo.max_num_steps=80", timeout=550)
    assert done.code == 0, done.errors
    accuracy = done.values("val:accuracy")
    assert 0.05 <= accuracy[0] <= 0.25
    assert accuracy[-1] >= 0.4
