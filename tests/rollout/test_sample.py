"""The data carrier refuses what cannot be a sample."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest

from slurmkit.rollout.sample import Sample

SAMPLE = Sample(
    token_ids=numpy.array([256, 55, 49, 257], numpy.int32),
    loss_mask=numpy.array([False, False, True, True]),
    logprobs=numpy.array([0, 0, -0.7, -0.1], numpy.float32),
    advantage=numpy.array([0, 0, 1.3, 1.3], numpy.float32),
    group_id=12,
    rollout_id=195,
    temperature=1.0,
    weight_version=3,
    finish_reason="stop",
)


@pytest.mark.parametrize(
    "field", ["token_ids", "loss_mask", "logprobs", "advantage", "prev_logprobs", "reference_logprobs"]
)
def test_arrays_of_unequal_length_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"'{field}': 3"):
        replace(SAMPLE, **{field: numpy.zeros(3)})


def test_the_first_token_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="first token"):
        replace(SAMPLE, loss_mask=numpy.array([True, False, True, True]))


def test_trained_tokens_are_those_that_the_policy_chose() -> None:
    assert SAMPLE.num_trained_tokens == 2
