"""Runs whose rollouts begin before their step: how old what they train on is, and how they go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.driver import EVERY_STEP, TINY, Run, ended, last_logged, run, start, until, without_times

pytestmark = pytest.mark.ray

ASYNCHRONOUS = (
    "grpo.async_grpo.enabled=true",
    "grpo.async_grpo.max_trajectory_age_steps=2",
    "loss_fn.use_importance_sampling_correction=true",
    "loss_fn.truncated_importance_sampling_type=tis",
    "loss_fn.truncated_importance_sampling_ratio=2",
    "checkpointing.save_period=1",
    *EVERY_STEP,
)


def positions(folder: Path) -> list[int]:
    states = sorted(folder.glob("step_*/trainer.json"), key=lambda path: int(path.parent.name.partition("_")[2]))
    return [json.loads(path.read_text())["position"] for path in states]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = run(tmp_path_factory.mktemp("asynchronous") / "run", TINY, *ASYNCHRONOUS)
    assert done.code == 0, done.errors
    return done


def test_asynchronous_samples_stay_within_the_age_limit_and_are_corrected(whole: Run) -> None:
    oldest = whole.values("train:age_max")
    assert oldest[0] == 0
    assert max(oldest) == 2
    assert all(mean <= most for mean, most in zip(whole.values("train:age_mean"), oldest, strict=True))
    weights = whole.values("train:sampling_importance_ratio")
    assert any(abs(weight - 1) > 1e-4 for weight in weights)
    # Before a step's first update the ratio is against the policy itself, whoever sampled.
    assert whole.values("train:ratio_max") == pytest.approx([1.0] * len(weights), abs=1e-4)
    assert all(0 <= part <= 1 for name in ("trainer", "engines") for part in whole.values(f"perf:{name}_idle"))


def test_each_step_has_its_own_tasks_and_a_resumed_run_redraws_begun_ones(whole: Run, tmp_path: Path) -> None:
    assert positions(whole.folder) == [4 * step for step in range(1, 9)]
    driver = start(tmp_path, TINY, *ASYNCHRONOUS)
    until(lambda: last_logged(tmp_path) >= 3, driver)
    driver.terminate()
    assert ended(driver, tmp_path).code == 85
    again = run(tmp_path, TINY, *ASYNCHRONOUS)
    assert again.code == 0, again.errors
    assert "going on after step" in again.output
    assert [line["step"] for line in again.lines] == list(range(9))
    assert positions(tmp_path) == positions(whole.folder)


def test_an_age_of_0_is_the_synchronous_run(finished: Run, tmp_path: Path) -> None:
    of_no_age = ("grpo.async_grpo.enabled=true", "grpo.async_grpo.max_trajectory_age_steps=0")
    done = run(tmp_path, TINY, *of_no_age, "checkpointing.metric_name=train:reward_mean")
    assert done.code == 0, done.errors
    assert without_times(tmp_path) == without_times(finished.folder)
    assert set(done.values("train:age_max")) == {0}
