"""From samples to what each rank trains on: packed without padding, alike in work, with the loss's denominators.

Shapes: T positions of one micro-batch, its sequences lying end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from heapq import heappop, heappush, heapreplace
from itertools import chain, groupby
from operator import attrgetter
from typing import Any

import numpy
import torch

from slurmkit.config.algorithm import LossFn
from slurmkit.rollout.sample import Sample

# Where attention costs a token as much as all the rest of the model: 10k for Qwen3-0.6B, 27k for Qwen3-4B.
_QUADRATIC_LENGTH = 1 << 14


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

    def __reduce__(self) -> Any:
        """As numpy arrays: pickling tensors would take the driver ten times as long."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _unpickled, ({k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in values.items()},)


def _unpickled(values: dict[str, Any]) -> MicroBatch:
    # Copied, as what Ray hands over cannot be written to.
    tensors: dict[str, Any] = {k: torch.tensor(v) for k, v in values.items() if isinstance(v, numpy.ndarray)}
    return MicroBatch(**(values | tensors))


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
    """Cut the samples of a step into optimiser steps of `global_batch_size` episodes, and each of those into
    micro-batches over `num_ranks`. The samples of an episode follow each other.

    Samples that have no gradient (nothing is trained, or all advantages are 0 and nothing else in the loss pulls) are
    counted in the denominators and left out; an optimiser step without any other is, too.
    """
    steps = []
    episodes = [list(each) for _, each in groupby(samples, key=attrgetter("rollout_id"))]
    for first in range(0, len(episodes), global_batch_size):
        batch = list(chain.from_iterable(episodes[first : first + global_batch_size]))
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
    shares = share_out([len(sample.token_ids) for sample, _ in samples], max_tokens, num_ranks)
    return tuple(tuple(pack([samples[index] for index in indices]) for indices in share) for share in shares)


def share_out(lengths: Sequence[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """For each rank its micro-batches, as indices of sequences of these lengths. Each index is in one of them.

    All ranks get equally many, if need be empty ones, and those that they work on at the same time are alike in work:
    sharded layers make everybody wait for the slowest. Together a micro-batch's sequences are at most `max_tokens`
    long. The same arguments give the same result. ValueError where a sequence is longer than a micro-batch.
    """
    if max(lengths, default=0) > max_tokens:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a micro-batch of {max_tokens}")
    work = [length * (1 + length / _QUADRATIC_LENGTH) for length in lengths]
    rounds = max(1, -(-sum(lengths) // (max_tokens * num_ranks)))
    while (packs := _even_packs(lengths, work, max_tokens, rounds * num_ranks)) is None:
        rounds += 1
    # Neighbours in order of work are worked on at the same time, from the left and from the right in turn.
    rows = [packs[first : first + num_ranks] for first in range(0, len(packs), num_ranks)]
    return [
        [list(row[rank if number % 2 == 0 else -1 - rank]) for number, row in enumerate(rows)]
        for rank in range(num_ranks)
    ]


def _even_packs(
    lengths: Sequence[int], work: Sequence[float], max_tokens: int, count: int
) -> list[tuple[int, ...]] | None:
    """Longest first, each to the pack with the least work that has room; most work first. None if one finds no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    rooms = [max_tokens] * count
    queue = [(0.0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        passed = []
        while rooms[queue[0][1]] < lengths[index]:
            passed.append(heappop(queue))
            if not queue:
                return None
        load, number = queue[0]
        heapreplace(queue, (load + work[index], number))
        packs[number].append(index)
        rooms[number] -= lengths[index]
        for entry in passed:
            heappush(queue, entry)
    return [tuple(packs[number]) for _, number in sorted(queue, key=lambda entry: (-entry[0], entry[1]))]


def pack(samples: Sequence[tuple[Sample, float]]) -> MicroBatch:
    """Samples, each with what its tokens weigh, end to end; of none, one token that trains nothing."""
    if not samples:
        nothing = torch.zeros(1)
        return MicroBatch(nothing.long(), nothing.long(), (1,), nothing.bool(), *[nothing] * 5)
    lengths = [len(sample.token_ids) for sample, _ in samples]
    starts = numpy.cumsum(lengths) - lengths

    def joined(name: str, kind: type) -> torch.Tensor:
        return torch.from_numpy(numpy.concatenate([getattr(sample, name) for sample, _ in samples], dtype=kind))

    def joined_if_there(name: str) -> torch.Tensor | None:
        return None if getattr(samples[0][0], name) is None else joined(name, numpy.float32)

    weights = numpy.array([weight for _, weight in samples], numpy.float32)
    return MicroBatch(
        token_ids_T=joined("token_ids", numpy.int64),
        position_ids_T=torch.from_numpy(numpy.arange(sum(lengths)) - numpy.repeat(starts, lengths)),
        lengths=tuple(lengths),
        mask_T=joined("loss_mask", numpy.bool_),
        sampled_logprobs_T=joined("logprobs", numpy.float32),
        advantages_T=joined("advantage", numpy.float32),
        weights_T=torch.from_numpy(numpy.repeat(weights, lengths)),
        prev_logprobs_T=joined_if_there("prev_logprobs"),
        reference_logprobs_T=joined_if_there("reference_logprobs"),
    )
