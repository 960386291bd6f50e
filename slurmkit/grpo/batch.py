"""From samples to what each rank trains on.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slurmkit.rollout.sample import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of one forward and backward, padded on the right to the longest.

    All tensors are [B, T]. `attended_BT` is 1 on tokens, 0 on padding; `mask_BT` is 1 where the loss counts.
    """

    token_ids_BT: torch.Tensor
    attended_BT: torch.Tensor
    mask_BT: torch.Tensor
    sampled_logprobs_BT: torch.Tensor
    advantages_BT: torch.Tensor


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One optimiser step: the micro-batches of each rank, equally many, and the denominators over all of them.

    `num_valid_tokens` also counts the tokens of samples that were left out because their group carries no signal:
    their part of the gradient is exactly 0, so leaving them out saves their forward pass and changes nothing else.
    `num_trained_tokens` counts those that are in the micro-batches.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]
    num_valid_tokens: int
    num_trained_tokens: int


def optimizer_steps(
    samples: Sequence[Sample], *, global_batch_size: int, micro_batch_size: int, num_ranks: int
) -> list[OptimizerStep]:
    """Cut the samples of a step into optimiser steps, and each of those into micro-batches over ranks.

    Samples whose advantage is 0 everywhere are counted and left out; an optimiser step without any other is too.
    Ranks get sequences of like length, and equally many micro-batches: where there is nothing for one, a micro-batch
    without a single trained token keeps its rank in step with the others.
    """
    steps = []
    for first in range(0, len(samples), global_batch_size):
        batch = samples[first : first + global_batch_size]
        trained = sorted((sample for sample in batch if any(sample.advantage)), key=lambda s: len(s.token_ids))
        if not trained:
            continue
        shares = [trained[rank::num_ranks] for rank in range(num_ranks)]
        count = math.ceil(len(shares[0]) / micro_batch_size)
        steps.append(
            OptimizerStep(
                ranks=tuple(
                    tuple(_micro_batch(share[i * micro_batch_size : (i + 1) * micro_batch_size]) for i in range(count))
                    for share in shares
                ),
                num_valid_tokens=sum(sample.num_trained_tokens for sample in batch),
                num_trained_tokens=sum(sample.num_trained_tokens for sample in trained),
            )
        )
    return steps


def _micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    if not samples:
        nothing = torch.zeros(1, 2)
        return MicroBatch(nothing.long(), torch.ones(1, 2).long(), nothing.long(), nothing, nothing)
    width = max(len(sample.token_ids) for sample in samples)

    def padded(rows: list[tuple[int, ...]] | list[tuple[float, ...]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)

    return MicroBatch(
        token_ids_BT=padded([sample.token_ids for sample in samples], torch.long),
        attended_BT=padded([(1,) * len(sample.token_ids) for sample in samples], torch.long),
        mask_BT=padded([sample.loss_mask for sample in samples], torch.long),
        sampled_logprobs_BT=padded([sample.logprobs for sample in samples], torch.float32),
        advantages_BT=padded([sample.advantage for sample in samples], torch.float32),
    )
