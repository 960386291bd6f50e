"""examples/grpo_smollm2.yaml: its tasks, and two steps with the real model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.driver import run
from tests.support.requirements import REPOSITORY, need_smollm2

EXAMPLE, SUMS = REPOSITORY / "examples/grpo_smollm2.yaml", REPOSITORY / "examples/sums"


def pairs(name: str) -> set[frozenset[int]]:
    """Return the pairs of numbers that a file adds, and check its answers."""
    found = set()
    for line in (SUMS / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"][-1]["content"])]
        assert sum(numbers) == int(row["answer"])
        found.add(frozenset(numbers))
    return found


def test_no_pair_of_numbers_is_both_trained_and_validated_on() -> None:
    train, held_out = pairs("train"), pairs("val")
    assert (len(train), len(held_out)) == (55, 22)
    assert not train & held_out
    assert frozenset([2]) not in train | held_out, "the prompt shows 2 + 2"


@pytest.mark.ray
@pytest.mark.model
@pytest.mark.model
def test_the_real_model_takes_two_steps_and_answers_in_the_shown_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_smollm2()
    monkeypatch.chdir(REPOSITORY)  # paths in the example are relative
    small = ("grpo.max_num_steps=2", "grpo.num_prompts_per_step=2", "grpo.max_val_samples=8", "grpo.val_at_end=false")
    done = run(tmp_path / "run", EXAMPLE, *small, "checkpointing.enabled=false", timeout=500)
    assert done.code == 0, done.output + done.errors
    assert len(done.values("train:reward_mean")) == 2
    assert max(done.values("train:prompts_too_long")) == 0
    assert max(done.values("train:completion_tokens_mean")) < 8
