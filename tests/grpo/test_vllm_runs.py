"""Runs whose engine is vLLM, in Ray: what a user starts, and what is left of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from driver import TINY, Run, last_logged, left_behind, processes_of, run, start, until
from tiny import tiny_config

from slurmkit.errors import UserError
from slurmkit.grpo import cluster

VLLM = (
    "policy.generation.backend=vllm",
    "policy.generation.vllm_cfg.kv_cache_memory_bytes=16777216",
    "checkpointing.save_period=2",
    "checkpointing.keep_top_k=null",
    "checkpointing.metric_name=train:reward_mean",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps without interruption."""
    before = left_behind()
    done = run(tmp_path_factory.mktemp("vllm") / "run", TINY, *VLLM, "grpo.max_num_steps=4")
    assert done.code == 0, done.errors
    assert left_behind() <= before
    return done


def test_vllm_samples_with_the_policys_weights_after_every_update(whole: Run) -> None:
    errors = whole.values("train:token_mult_prob_error")
    assert len(errors) >= 3
    assert max(errors) < 1 + 1e-3
    assert max(whole.values("train:grad_norm")) > 0.01  # and they did change
    assert "WARNING" not in whole.errors + whole.output


def test_a_run_on_vllm_that_goes_on_draws_what_it_would_have_drawn(whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder, symlinks=True)
    shutil.rmtree(folder / "step_4")
    again = run(folder, TINY, *VLLM, "grpo.max_num_steps=4")
    assert again.code == 0, again.errors
    assert "going on after step 2" in again.output
    for name in ("train:reward_mean", "train:completion_tokens_mean", "val:accuracy"):
        assert again.values(name) == whole.values(name)
    assert again.values("train:loss") == pytest.approx(whole.values("train:loss"), abs=1e-4)


def test_an_engine_whose_process_dies_is_started_again_and_once_too_often_ends_the_run_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    before = left_behind()
    driver = start(tmp_path, TINY, *VLLM, "grpo.max_num_steps=1000", "policy.generation.max_restarts=1")
    family = []
    for _ in range(2):
        step = last_logged(tmp_path)
        until(lambda step=step: last_logged(tmp_path) >= step + 2, driver)  # type: ignore[misc]
        now = processes_of(driver)
        family += now
        next(each for each in now if each.name().startswith("VLLM::EngineCor")).kill()
    try:
        output, errors = driver.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        driver.kill()
        raise
    assert driver.returncode == 75
    message = r"^error: engine 0 on node \S+ failed in collect\(\): vLLM's processes died: "
    assert re.search(message, errors, re.MULTILINE), errors
    assert "started again, for the 1. time of 1" in output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["train:token_mult_prob_error"] for line in lines if "train:token_mult_prob_error" in line]
    assert max(found) < 1 + 1e-3  # also of the engine that took over
    deadline = time.monotonic() + 30
    while left := [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert left_behind() <= before


def test_vllm_that_is_not_installed_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    config = tiny_config(tmp_path, policy={"generation": {"backend": "vllm"}})
    with pytest.raises(
        UserError, match=r"policy.generation.backend: vllm is not installed .* install slurmkit\[vllm\]"
    ):
        cluster.start_actors(config, tmp_path, 0, tmp_path)
