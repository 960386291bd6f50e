"""Runs whose engine is vLLM, in Ray: what a user starts, and what is left of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from slurmkit.errors import UserError
from slurmkit.grpo import cluster
from tests.support.driver import (
    TINY,
    Run,
    all_end,
    ended,
    last_logged,
    nothing_left_behind,
    processes_of,
    run,
    start,
    until,
)
from tests.support.tiny_model import tiny_config

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
    with nothing_left_behind():
        done = run(tmp_path_factory.mktemp("vllm") / "run", TINY, *VLLM, "grpo.max_num_steps=4")
    assert done.code == 0, done.errors
    return done


@pytest.mark.vllm
def test_vllm_samples_with_the_policys_weights_after_every_update(whole: Run) -> None:
    errors = whole.values("train:token_mult_prob_error")
    assert len(errors) >= 3
    assert max(errors) < 1 + 1e-3
    assert max(whole.values("train:grad_norm")) > 0.01  # and they did change
    assert "WARNING" not in whole.errors + whole.output


@pytest.mark.vllm
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


@pytest.mark.ray
@pytest.mark.vllm
def test_agents_sample_over_http_while_the_policy_trains_asynchronously(
    tmp_path: Path,
) -> None:
    driver = start(
        tmp_path,
        TINY,
        *VLLM,
        "grpo.max_num_steps=6",
        # Long ones and few at once, so that there is always one under way.
        "policy.max_total_sequence_length=200",
        "policy.generation.max_new_tokens=160",
        "policy.generation.max_batch_size=8",
        "policy.generation.vllm_cfg.expose_http_server=true",
        "grpo.async_grpo.enabled=true",
        "grpo.async_grpo.in_flight_weight_updates=true",
        "loss_fn.use_importance_sampling_correction=true",
    )
    serving = tmp_path / "serving"
    until((serving / "engine_0.json").exists, driver)
    told, key = json.loads((serving / "engine_0.json").read_text()), (serving / "api_key").read_text().strip()
    body = {"model": told["model"], "messages": [{"role": "user", "content": "1+2="}], "max_tokens": 30}
    request = urllib.request.Request(
        f"{told['base_url']}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["choices"][0]["finish_reason"] in ("stop", "length")
    done = ended(driver, tmp_path)
    assert done.code == 0, done.errors
    assert key not in done.output + done.errors
    assert not serving.exists()
    assert max(done.values("train:age_max")) == 1


def engine_core(driver: subprocess.Popen[str]) -> psutil.Process | None:
    """Return the process of vLLM's engine, None while it is not there."""
    for process in processes_of(driver):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("VLLM::EngineCor") and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.faults
@pytest.mark.nightly
def test_a_dead_vllm_engine_restarts_until_the_limit_ends_the_run_cleanly(
    tmp_path: Path,
) -> None:
    with nothing_left_behind():
        driver = start(tmp_path, TINY, *VLLM, "grpo.max_num_steps=1000", "policy.generation.max_restarts=1")
        family: list[psutil.Process] = []
        for _ in range(2):
            step = last_logged(tmp_path)
            until(lambda step=step: last_logged(tmp_path) >= step + 2, driver)  # type: ignore[misc]
            # Steps whose episodes were there already may be logged before the engine has been started again.
            until(lambda: engine_core(driver) is not None, driver)
            family += processes_of(driver)
            core = engine_core(driver)
            assert core is not None
            core.kill()
        done = ended(driver, tmp_path)
        all_end(family)
    assert done.code == 75
    message = r"^error: engine 0 on node \S+ failed in collect\(\): vLLM's processes died: "
    assert re.search(message, done.errors, re.MULTILINE), done.errors
    assert "started again, for the 1. time of 1" in done.output
    assert max(done.values("train:token_mult_prob_error")) < 1 + 1e-3  # also of the engine that took over


def test_vllm_that_is_not_installed_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    config = tiny_config(tmp_path, policy={"generation": {"backend": "vllm"}})
    with pytest.raises(
        UserError, match=r"policy.generation.backend: vllm is not installed .* install slurmkit\[vllm\]"
    ):
        cluster.start_actors(config, tmp_path, 0, tmp_path)
