"""Figures, transcripts and the end of a run that is good enough."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from slurmkit.config.algorithm import Grpo
from slurmkit.errors import Failure
from slurmkit.grpo.validation import is_good_enough, pass_at_k, validation_metrics, write_transcripts
from tests.support.groups import episode, group, of


@pytest.mark.parametrize("num", [1, 2, 5, 8])
def test_pass_at_k_is_the_fraction_of_k_subsets_with_a_correct_episode(num: int) -> None:
    for correct in range(num + 1):
        outcomes = [True] * correct + [False] * (num - correct)
        for k in range(1, num + 1):
            choices = [any(choice) for choice in combinations(outcomes, k)]
            assert pass_at_k(num, correct, k) == pytest.approx(sum(choices) / len(choices))


def test_accuracy_is_the_mean_and_pass_at_k_has_powers_of_two_and_n() -> None:
    groups = [group(1, 0, 0, 0, 0, 0), group(1, 1, 1, 0, 0, 0)]
    metrics = validation_metrics(groups, Grpo(val_num_generations_per_prompt=6))
    assert metrics["val:accuracy"] == metrics["val:pass@1"] == pytest.approx(4 / 12)
    assert metrics["val:pass@2"] == pytest.approx((5 / 15 + 12 / 15) / 2)
    assert metrics["val:pass@4"] == pytest.approx((10 / 15 + 1) / 2)
    assert metrics["val:pass@6"] == 1
    assert sum(name.startswith("val:pass") for name in metrics) == 4


def test_a_single_episode_per_task_has_no_pass_at_k() -> None:
    metrics = validation_metrics([group(1), of(episode(0.5, length=6, reason="length", correct=False))], Grpo())
    assert metrics == {
        "val:accuracy": 0.5,
        "val:reward_mean": 0.75,
        "val:reward_std": 0.25,
        "val:completion_tokens_mean": 4,
        "val:truncated_fraction": 0.5,
        "val:broken_episodes": 0,
        "val:prompts_too_long": 0,
        "val:turns_mean": 1,
        "val:tool_calls_mean": 0,
        "val:malformed_tool_calls": 0,
        "val:max_turns_reached": 0,
        "val:timed_out": 0,
    }


def test_a_task_with_broken_episodes_counts_only_for_reachable_k() -> None:
    metrics = validation_metrics([group(1, broken=["x"]), group(0, 1)], Grpo(val_num_generations_per_prompt=2))
    assert metrics["val:pass@1"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["val:pass@2"] == 1
    assert metrics["val:accuracy"] == pytest.approx(2 / 3)
    assert metrics["val:broken_episodes"] == 1
    assert "val:pass@2" not in validation_metrics([group(1, broken=["x"])], Grpo(val_num_generations_per_prompt=2))
    with pytest.raises(Failure, match="the environment broke in all 2 validation episodes; first in task a: no"):
        validation_metrics([of(broken=["task a: no", "task b: no"])], Grpo())


def test_conversations_are_kept_in_a_file_of_their_step(tmp_path: Path) -> None:
    write_transcripts(tmp_path, 4, [group(1.0, 0.0, name="é")])
    write_transcripts(tmp_path, 4, [group(1.0, 0.0, name="é")])  # a step that is made again
    lines = [json.loads(line) for line in (tmp_path / "validation" / "step_4.jsonl").read_text().splitlines()]
    said = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "1"}]
    expected = {"task": "é", "messages": said, "finish_reason": "stop"}
    assert lines == [expected | {"reward": 1.0, "correct": True}, expected | {"reward": 0.0, "correct": False}]
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step_4.jsonl"]
    (tmp_path / "validation" / "step_5.jsonl").mkdir()
    with pytest.raises(Failure, match=r"step_5\.jsonl cannot be written: Is a directory"):
        write_transcripts(tmp_path, 5, [group(1.0)])


def test_a_run_is_good_enough_once_its_metric_reaches_the_threshold() -> None:
    grpo = Grpo(
        val_num_generations_per_prompt=4, stop_at_validation_metric="val:pass@4", stop_at_validation_threshold=0.5
    )
    found = [is_good_enough({"val:pass@4": value}, grpo) for value in (0.49, 0.5, 0.51)]
    assert found == [False, True, True]
    assert not is_good_enough({"val:accuracy": 1.0}, grpo)  # a step without a validation
    assert not is_good_enough({"val:pass@4": 1.0}, Grpo())
