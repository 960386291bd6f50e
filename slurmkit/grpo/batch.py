"""From samples to what each rank trains on: packed without padding, alike in work, with the loss's denominators.

Shapes: T positions of one micro-batch, its sequences lying end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy
import torch

from slurmkit.config.algorithm import LossFn
from slurmkit.rollout.sample import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of one forward and backward, end to end. All tensors are [T].

    `lengths` are the sequences', in order, T in all; `position_ids_T` starts at 0 in each. `mask_T` is true where the
    loss counts; a sequence's first position never is. `weights_T` is what a token's loss is multiplied by before
    everything is added up: the denominator of the whole optimiser step, over all micro-batches and ranks.
    """

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    lengths: tuple[int, ...]
    mask_T: torch.Tensor
    sampled_logprobs_T: torch.Tensor
    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    prev_logprobs_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same, with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device) if isinstance(value := getattr(self, field.name), torch.Tensor) else value
            for field in fields(self)
        }
        return MicroBatch(**moved)


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """One optimiser step: the micro-batches of each data-parallel rank, equally many.

    `num_valid_tokens` counts what the denominators count, samples that were left out included; `num_trained_tokens`
    what is in the micro-batches.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]
    num_valid_tokens: int
    num_trained_tokens: int


def optimizer_steps(
    samples: Sequence[Sample],
    *,
    global_batch_size: int,
    micro_batch_tokens: int,
    num_ranks: int,
    loss_fn: LossFn,
) -> list[OptimizerStep]:
    """Cut the samples of a step into optimiser steps, and each of those into micro-batches over `num_ranks`.

    Samples that have no gradient (nothing is trained, or all advantages are 0 and nothing else in the loss pulls) are
    counted in the denominators and left out; an optimiser step without any other is, too.
    """
    steps = []
    for first in range(0, len(samples), global_batch_size):
        batch = samples[first : first + global_batch_size]
        weights = loss_weights(batch, loss_fn)
        trained = [
            (sample, weight)
            for sample, weight in zip(batch, weights, strict=True)
            if sample.advantage.any() or (loss_fn.trains_without_advantage and sample.num_trained_tokens)
        ]
        if not trained:
            continue
        steps.append(
            OptimizerStep(
                ranks=_micro_batches(trained, micro_batch_tokens, num_ranks),
                num_valid_tokens=sum(sample.num_trained_tokens for sample in batch),
                num_trained_tokens=sum(sample.num_trained_tokens for sample, _ in trained),
            )
        )
    return steps


def loss_weights(samples: Sequence[Sample], loss_fn: LossFn) -> list[float]:
    """What each sample's tokens weigh in the loss of the optimiser step that `samples` make up.

    Alike for all tokens (DAPO, arXiv 2503.14476, equation 8), or alike for all episodes: 1 / (episodes × the episode's
    tokens) (GRPO, arXiv 2402.03300, equation 3), or 1 / (episodes × a constant) (Dr. GRPO, arXiv 2503.20783, appendix).
    An episode that became several samples counts once; one without a trained token does not count.
    """
    tokens: Counter[int] = Counter()
    for sample in samples:
        tokens[sample.rollout_id] += sample.num_trained_tokens
    if loss_fn.token_level_loss:
        return [1 / max(1, tokens.total())] * len(samples)
    num_episodes = max(1, sum(count > 0 for count in tokens.values()))
    return [1 / (num_episodes * (loss_fn.constant_length or max(1, tokens[sample.rollout_id]))) for sample in samples]


def _micro_batches(
    samples: Sequence[tuple[Sample, float]], max_tokens: int, num_ranks: int
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Longest first to the rank with the least, then first fit; short ranks get micro-batches that train nothing."""
    shares: list[list[tuple[Sample, float]]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for sample, weight in sorted(samples, key=lambda each: len(each[0].token_ids), reverse=True):
        rank = loads.index(min(loads))
        shares[rank].append((sample, weight))
        loads[rank] += len(sample.token_ids)
    packs = [_first_fit(share, max_tokens) for share in shares]
    count = max(map(len, packs))
    return tuple(tuple(map(_pack, [*pack, *[[]] * (count - len(pack))])) for pack in packs)


def _first_fit(samples: Sequence[tuple[Sample, float]], max_tokens: int) -> list[list[tuple[Sample, float]]]:
    packs: list[list[tuple[Sample, float]]] = []
    room: list[int] = []
    for each in samples:
        length = len(each[0].token_ids)
        index = next((i for i, left in enumerate(room) if left >= length), None)
        if index is None:
            index = len(packs)
            packs.append([])
            room.append(max_tokens)
        packs[index].append(each)
        room[index] -= length
    return packs


def _pack(samples: Sequence[tuple[Sample, float]]) -> MicroBatch:
    if not samples:
        nothing = torch.zeros(1)
        return MicroBatch(nothing.long(), nothing.long(), (1,), nothing.bool(), *[nothing] * 5)
    lengths = tuple(len(sample.token_ids) for sample, _ in samples)

    def joined(name: str, kind: type) -> torch.Tensor:
        return torch.from_numpy(numpy.concatenate([getattr(sample, name) for sample, _ in samples], dtype=kind))

    def joined_if_there(name: str) -> torch.Tensor | None:
        return None if getattr(samples[0][0], name) is None else joined(name, numpy.float32)

    return MicroBatch(
        token_ids_T=joined("token_ids", numpy.int64),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        mask_T=joined("loss_mask", numpy.bool_),
        sampled_logprobs_T=joined("logprobs", numpy.float32),
        advantages_T=joined("advantage", numpy.float32),
        weights_T=torch.repeat_interleave(torch.tensor([weight for _, weight in samples]), torch.tensor(lengths)),
        prev_logprobs_T=joined_if_there("prev_logprobs"),
        reference_logprobs_T=joined_if_there("reference_logprobs"),
    )
