"""From samples to micro-batches on ranks."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import fields, replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from slurmkit.config.algorithm import LossFn
from slurmkit.grpo.batch import OptimizerStep, loss_weights, optimizer_steps, pack, share_out
from slurmkit.rollout.sample import Sample

SEQUENCE_LEVEL = LossFn.model_validate({"token_level_loss": False})


def a_sample(length: int, advantage: float, mark: int = 7, prompt: int = 1) -> Sample:
    """`length` trained tokens, all of them `mark`, after a prompt of ones."""
    mask = numpy.repeat([False, True], [prompt, length])
    return Sample(
        token_ids=numpy.where(mask, mark, 1).astype(numpy.int32),
        loss_mask=mask,
        logprobs=numpy.where(mask, -0.5, 0).astype(numpy.float32),
        advantage=numpy.where(mask, advantage, 0).astype(numpy.float32),
        group_id=0,
        rollout_id=mark,
        temperature=1.0,
        weight_version=0,
        finish_reason="stop",
    )


def steps_of(samples: list[Sample], **changes: Any) -> list[OptimizerStep]:
    arguments = {"global_batch_size": 64, "micro_batch_tokens": 16, "num_ranks": 1, "loss_fn": LossFn()}
    return optimizer_steps(samples, **(arguments | changes))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_tokens", [7, 16, 100])
def test_each_sample_is_trained_once_and_ranks_have_equal_micro_batches(
    num_ranks: int, micro_batch_tokens: int
) -> None:
    samples = [a_sample(length, 1.0, mark=10 + length) for length in (3, 1, 4, 2, 6)]
    (step,) = steps_of(samples, micro_batch_tokens=micro_batch_tokens, num_ranks=num_ranks)
    assert len({len(micro_batches) for micro_batches in step.ranks}) == 1
    marks = []
    for micro_batch in (each for micro_batches in step.ranks for each in micro_batches):
        assert len(micro_batch.token_ids_T) == sum(micro_batch.lengths) <= micro_batch_tokens
        for token_ids, mask in zip(
            micro_batch.token_ids_T.split(micro_batch.lengths),
            micro_batch.mask_T.split(micro_batch.lengths),
            strict=True,
        ):
            marks += token_ids[mask].unique().tolist()
            assert mask.tolist() == [False, *[True] * (len(mask) - 1)]
    assert sorted(marks) == [11, 12, 13, 14, 16]
    assert step.num_valid_tokens == step.num_trained_tokens == 16


LENGTHS = some.lists(some.integers(1, 100), max_size=60)


@given(LENGTHS, some.integers(100, 250), some.integers(1, 9))
def test_micro_batches_respect_their_token_limit_and_balance_the_ranks(
    lengths: list[int], max_tokens: int, num_ranks: int
) -> None:
    shares = share_out(lengths, max_tokens, num_ranks)
    assert shares == share_out(lengths, max_tokens, num_ranks)
    assert sorted(index for share in shares for indices in share for index in indices) == list(range(len(lengths)))
    (count,) = {len(share) for share in shares}
    tokens = numpy.array([[sum(lengths[index] for index in indices) for indices in share] for share in shares])
    assert tokens.max() <= max_tokens
    # No more than if every micro-batch had to leave room for the longest sequence.
    assert count <= max(1, -(-sum(lengths) // (num_ranks * (max_tokens - max(lengths, default=1) + 1))))
    # All ranks wait for the slowest at every micro-batch. These sequences are short: work is tokens.
    assert tokens.max(axis=0).sum() - tokens.sum() / num_ranks <= tokens.max() - tokens.min() + 1e-9


@given(some.lists(some.integers(1, 40), min_size=30, max_size=60), some.integers(2, 5))
def test_with_a_large_limit_ranks_differ_by_at_most_one_sequence(lengths: list[int], num_ranks: int) -> None:
    shares = share_out(lengths, 10_000, num_ranks)
    tokens = [sum(lengths[index] for indices in share for index in indices) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_a_long_sequence_counts_for_more_than_its_tokens() -> None:
    # Attention makes it as dear as twice its tokens in short ones.
    shares = share_out([16_000, *[2_000] * 12], 64_000, 2)
    assert [0] in [share[0] for share in shares]


def test_a_sequence_that_no_micro_batch_has_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens does not fit a micro-batch of 16"):
        share_out([3, 17], 16, 1)


def test_samples_without_advantage_count_in_the_denominator_only() -> None:
    samples = [a_sample(2, 1.0), a_sample(5, 0.0), a_sample(3, -1.0)]
    (step,) = steps_of(samples)
    (micro_batch,) = step.ranks[0]
    assert micro_batch.lengths == (4, 3)
    assert step.num_valid_tokens == 10
    assert step.num_trained_tokens == 5
    assert micro_batch.weights_T.tolist() == pytest.approx([0.1] * 7)


def test_an_optimiser_step_in_which_nothing_can_be_learned_is_left_out() -> None:
    samples = [a_sample(2, float(mark > 3), mark=mark) for mark in (2, 3, 4, 5)]
    assert len(steps_of(samples, global_batch_size=2)) == 1
    assert steps_of(samples[:2], global_batch_size=2) == []


def test_an_optimiser_step_counts_episodes_and_tears_none_of_them_apart() -> None:
    samples = [a_sample(2, 1.0, mark=mark) for mark in (2, 3, 3, 3, 4, 5)]
    first, second = steps_of(samples, global_batch_size=2)
    assert [step.num_trained_tokens for step in (first, second)] == [8, 4]


def test_positions_start_anew_in_every_sequence() -> None:
    micro_batch = pack([(a_sample(3, 1.0), 0.5), (a_sample(1, 1.0), 0.25)])
    assert micro_batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert micro_batch.weights_T.tolist() == [0.5] * 4 + [0.25] * 2


def test_a_rank_without_a_sample_gets_tokens_that_train_nothing() -> None:
    (step,) = steps_of([a_sample(2, 1.0)], num_ranks=2)
    ((micro_batch,),) = (micro_batches for micro_batches in step.ranks if not micro_batches[0].mask_T.any())
    assert micro_batch.lengths == (1,)
    assert len(micro_batch.token_ids_T) == 1
    assert not micro_batch.weights_T.any()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_tokens", [12, 30, 1000])
@pytest.mark.parametrize("loss_fn", [LossFn(), SEQUENCE_LEVEL])
def test_loss_weights_of_trained_tokens_sum_to_one_for_every_split(
    num_ranks: int, micro_batch_tokens: int, loss_fn: LossFn
) -> None:
    samples = [a_sample(length, 1.0, mark=length) for length in (3, 1, 9, 2, 6, 5)]
    (step,) = steps_of(samples, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens, loss_fn=loss_fn)
    batches = [micro_batch for micro_batches in step.ranks for micro_batch in micro_batches]
    assert sum(float(each.weights_T[each.mask_T].sum()) for each in batches) == pytest.approx(1, abs=1e-6)


def test_an_episode_in_several_samples_weighs_as_one_and_untrained_as_none() -> None:
    untrained = replace(a_sample(2, 1.0, mark=30), loss_mask=numpy.zeros(3, bool))
    samples = [a_sample(2, 1.0, mark=10), a_sample(6, 1.0, mark=10), a_sample(4, 1.0, mark=20), untrained]
    assert loss_weights(samples, SEQUENCE_LEVEL)[:3] == pytest.approx([1 / (2 * 8), 1 / (2 * 8), 1 / (2 * 4)])
    assert loss_weights(samples, LossFn())[:3] == pytest.approx([1 / 12] * 3)
    assert loss_weights([untrained], SEQUENCE_LEVEL) == [1]


def test_logprobs_of_policy_and_reference_travel_with_their_tokens() -> None:
    samples = [
        replace(a_sample(length, 1.0), prev_logprobs=numpy.full(length + 1, length, numpy.float32)) for length in (2, 3)
    ]
    micro_batch = pack([(sample, 1.0) for sample in samples])
    assert micro_batch.prev_logprobs_T is not None
    assert micro_batch.prev_logprobs_T.tolist() == [2, 2, 2, 3, 3, 3, 3]
    assert micro_batch.reference_logprobs_T is None


def test_a_micro_batch_arrives_on_a_rank_as_it_left_and_can_be_written_to() -> None:
    left = pack([(a_sample(3, 1.0), 0.5)])
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(left, protocol=5, buffer_callback=buffers.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of memory that cannot be written to, as Ray's cannot
        arrived = pickle.loads(stream, buffers=[bytes(buffer) for buffer in buffers])
    for field in fields(left):
        before, after = getattr(left, field.name), getattr(arrived, field.name)
        assert type(before) is type(after)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
            after.zero_()
        else:
            assert before == after
