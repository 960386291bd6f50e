"""Which groups a step trains on, and what is said about the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy
import pytest

from slurmkit.config.algorithm import Grpo, LossFn, RewardScaling, RewardShaping
from slurmkit.errors import Failure
from slurmkit.grpo.batch import loss_weights
from slurmkit.grpo.credit import credit, make_samples
from slurmkit.grpo.selection import Selection, select, without_truncated
from slurmkit.rollout.collect import Group
from tests.support.groups import episode, group, of

PLAIN = Grpo(normalize_rewards=False, use_leave_one_out_baseline=False)
MIXED, RIGHT, WRONG = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def selected(batches: Sequence[Sequence[Group]], **grpo: Any) -> tuple[Selection, list[tuple[int, int]]]:
    """What is selected of batches that are played one after the other, and how each was asked for."""
    asked = []

    async def play(count: int, before: int) -> list[Group]:
        asked.append((count, before))
        return list(batches[len(asked) - 1])

    return asyncio.run(select(play, Grpo(num_generations_per_prompt=2, **grpo))), asked


def named(*rewards: tuple[float, ...]) -> list[Group]:
    return [group(*each, name=str(index)) for index, each in enumerate(rewards)]


def test_without_dynamic_sampling_one_batch_is_played_and_all_of_it_kept() -> None:
    batch = named(MIXED, RIGHT, WRONG)
    selection, asked = selected([batch], num_prompts_per_step=3)
    assert selection.kept == batch
    assert asked == [(3, 0)]


def test_groups_whose_rewards_are_equal_are_replaced_by_further_tasks() -> None:
    batches = [named(MIXED, RIGHT, WRONG), named(WRONG, MIXED, WRONG), named(MIXED, MIXED, RIGHT)]
    selection, asked = selected(batches, num_prompts_per_step=3, use_dynamic_sampling=True)
    assert list(selection.kept) == [batches[0][0], batches[1][1], batches[2][0]]
    assert asked == [(3, 0), (3, 3), (3, 6)]
    metrics = selection.metrics({"train:dropped_groups/none_correct": 1.0})
    assert metrics["train:dropped_groups/all_correct"] == 2
    assert metrics["train:dropped_groups/none_correct"] == 3 + 1  # those of the groups kept are of another reason
    assert metrics["train:gen_batches"] == 3
    assert metrics["train:discarded_groups"] == 1


def test_a_batch_can_be_larger_than_a_step_and_what_is_too_much_is_counted() -> None:
    selection, asked = selected(
        [named(*[MIXED] * 5)], num_prompts_per_step=3, use_dynamic_sampling=True, batch_multiplier=1.5
    )
    assert asked == [(5, 0)]
    assert [each.task.name for each in selection.kept] == ["0", "1", "2"]
    assert selection.num_discarded == 2


@pytest.mark.parametrize("rewards", [(1.0, *[0.0] * 15), (0.0, *[1.0] * 15)])
def test_one_success_or_failure_in_a_group_is_signal_and_keeps_the_group(rewards: tuple[float, ...]) -> None:
    # NeMo RL looks at each episode's spread of the others, which is 0 for the one that teaches most.
    selection, _ = selected([[group(*rewards)]], num_prompts_per_step=1, use_dynamic_sampling=True)
    assert len(selection.kept[0].episodes) == 16


def test_groups_without_signal_fail_the_step_after_its_last_batch() -> None:
    batches = [named(RIGHT, WRONG), named(WRONG, MIXED), [of(), of(episode(0.0, reason="prompt_too_long"))]]
    keys = {"num_prompts_per_step": 2, "use_dynamic_sampling": True, "dynamic_sampling_max_gen_batches": 3}
    with pytest.raises(Failure) as failed:
        selected(batches, **keys)
    assert str(failed.value).startswith(
        "1 of 6 groups carry signal after 3 batches (grpo.dynamic_sampling_max_gen_batches), and a step needs 2 "
        "(grpo.num_prompts_per_step); dropped: none_correct 2, prompt_too_long 2, all_correct 1. Try"
    )


def test_rewards_count_before_they_are_shaped_and_after_they_are_scaled() -> None:
    shaping = RewardShaping(enabled=True, overlong_buffer_length=4, max_response_length=8)
    by_length = of(episode(1.0, length=2), episode(1.0, length=8))
    by_reward = of(episode(1.0, length=8), episode(0.0, length=2))  # equal once it is shaped
    batches = [[by_length], [group(3.0, 2.0)], [by_reward]]
    scaling = RewardScaling(enabled=True)  # 3 and 2 are both clamped to 1
    selection, asked = selected(
        batches, num_prompts_per_step=1, use_dynamic_sampling=True, reward_shaping=shaping, reward_scaling=scaling
    )
    assert list(selection.kept) == [by_reward]
    assert len(asked) == 3


def test_the_reward_is_told_over_all_groups_and_over_those_that_differ() -> None:
    batches = [named(WRONG, MIXED), named(WRONG, MIXED)]
    selection, _ = selected(batches, num_prompts_per_step=2, use_dynamic_sampling=True)
    metrics = selection.metrics({})
    assert (metrics["train:reward_mean"], metrics["train:accuracy"]) == (0.25, 0.25)
    assert metrics["train:filtered_reward_mean"] == 0.5
    plain, _ = selected([named(WRONG, RIGHT, MIXED, WRONG)], num_prompts_per_step=4)
    assert plain.metrics({})["train:reward_mean"] == 3 / 8
    assert plain.metrics({})["train:filtered_reward_mean"] == 0.5
    assert "train:filtered_reward_mean" not in selected([named(WRONG)], num_prompts_per_step=1)[0].metrics({})


def test_an_environment_that_breaks_too_often_ends_the_run_with_its_task() -> None:
    broken = [group(1.0, 0.0), group(1.0, name="b", broken=["task b: ValueError: the reward is nan"]), of(broken="cd")]
    selection, _ = selected([broken], num_prompts_per_step=3)  # 3 of 6 are not more than half
    assert next(selection.remarks()) == (
        "the environment broke in 3 of 6 episodes, first in task b: ValueError: the reward is nan"
    )
    assert selection.metrics({})["train:broken_episodes"] == 3
    for dynamic in (False, True):
        with pytest.raises(Failure, match=r"3 of 6 .* more than grpo.max_broken_fraction 0.4; first in task b:"):
            selected([broken], num_prompts_per_step=3, max_broken_fraction=0.4, use_dynamic_sampling=dynamic)
    selected([[of(broken="ab")]], num_prompts_per_step=1, max_broken_fraction=1.0)


def test_a_too_long_prompt_is_named_and_ends_only_its_own_episodes() -> None:
    long = of(*[episode(0.0, name="long", reason="prompt_too_long")] * 2)
    selection, _ = selected([[group(1.0, 0.0), long]], num_prompts_per_step=2)
    assert list(selection.remarks()) == ["1 tasks whose prompt does not fit are not trained on: long (3 tokens)"]
    assert selection.metrics({})["train:prompts_too_long"] == 2
    samples, metrics = credit(selection.kept, make_samples(selection.kept), PLAIN, LossFn())
    assert len(samples) == 2
    assert metrics["train:dropped_groups/prompt_too_long"] == 1


def test_truncated_replies_leave_loss_and_denominators_but_not_statistics() -> None:
    groups = [of(episode(1.0, length=2), episode(0.0, length=4), episode(0.0, length=10, reason="length"))]
    samples, _ = credit(groups, make_samples(groups), PLAIN, LossFn())
    filtered = without_truncated(samples)
    assert [sample.num_trained_tokens for sample in filtered] == [2, 4, 0]
    # The mean that the others are compared with is over all three.
    assert [float(sample.advantage.max(initial=-9)) for sample in filtered] == pytest.approx([2 / 3, 0, 0])
    assert filtered[1].advantage[-1] == pytest.approx(-1 / 3)
    assert loss_weights(filtered, LossFn())[0] == pytest.approx(1 / 6)
    assert loss_weights(filtered, LossFn(token_level_loss=False))[0] == pytest.approx(1 / 2 / 2)
    assert numpy.array_equal(filtered[2].token_ids, samples[2].token_ids)
    selection, _ = selected([groups], num_prompts_per_step=1)
    metrics = selection.metrics({})
    assert metrics["train:completion_tokens_mean"] == pytest.approx(16 / 3)
    assert metrics["train:truncated_fraction"] == pytest.approx(1 / 3)
