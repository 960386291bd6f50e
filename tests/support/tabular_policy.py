"""A policy of five tokens small enough to enumerate: exact expectations in place of samples.

Shapes: T positions of packed sequences, V = 5 tokens.

An episode is the prompt (token 0), then one or two tokens; token 4 as the first ends it. The next token depends on the
last alone, so that the policy is a table of logits: a row for the prompt, and one for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

from slurmkit.grpo.batch import MicroBatch
from slurmkit.rollout.sample import Sample

NUM_TOKENS = 5
EPISODES = [(4,), *((first, second) for first in range(4) for second in range(NUM_TOKENS))]
PROMPT = 5  # its row in the table

Table = torch.Tensor
"""[6, V] logits."""


def a_table(seed: int, requires_grad: bool = False) -> Table:
    return torch.randn(
        6, NUM_TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_(requires_grad)


def near(table: Table, seed: int, distance: float = 0.3) -> Table:
    """A policy not far from another, as the one that sampled is."""
    return table.detach() + distance * a_table(seed)


def forward(table: Table, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropy at every position, as PolicyModel gives them: 0 at each sequence's first."""
    is_second_T = batch.position_ids_T == 1
    states_T = torch.where(is_second_T, PROMPT, batch.token_ids_T.roll(1))
    logprobs_TV = table.log_softmax(-1)[states_T]
    logprobs_T = logprobs_TV.gather(-1, batch.token_ids_T[:, None])[:, 0]
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    is_first_T = batch.position_ids_T == 0
    return logprobs_T.masked_fill(is_first_T, 0.0), entropy_T.masked_fill(is_first_T, 0.0)


def token_logprobs(table: Table, episode: Sequence[int]) -> torch.Tensor:
    """Of the tokens after the prompt."""
    logprobs = table.log_softmax(-1)
    return torch.stack([logprobs[state, token] for state, token in zip((PROMPT, *episode), episode, strict=False)])


def probability(table: Table, episode: Sequence[int]) -> torch.Tensor:
    return token_logprobs(table, episode).sum().exp()


def a_sample(
    episode: Sequence[int],
    advantage: float,
    sampled_from: Table,
    *,
    prev: Table | None = None,
    reference: Table | None = None,
    rollout_id: int = 0,
) -> Sample:
    def array(table: Table) -> numpy.ndarray:
        return numpy.array([0.0, *token_logprobs(table, episode).tolist()], numpy.float32)

    return Sample(
        token_ids=numpy.array([0, *episode], numpy.int32),
        loss_mask=numpy.array([False] + [True] * len(episode)),
        logprobs=array(sampled_from.detach()),
        advantage=numpy.array([0.0] + [advantage] * len(episode), numpy.float32),
        group_id=0,
        rollout_id=rollout_id,
        temperature=1.0,
        weight_version=0,
        finish_reason="stop",
        prev_logprobs=None if prev is None else array(prev.detach()),
        reference_logprobs=None if reference is None else array(reference.detach()),
    )


def in_one_batch(samples: Sequence[Sample], weights: Sequence[float]) -> MicroBatch:
    """Packed end to end, in float64, each token with its sample's weight. A weight that is a probability, over all
    episodes, makes the loss an exact expectation."""

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy.concatenate([getattr(sample, name) for sample in samples]).astype(numpy.float64))

    def joined_if_there(name: str) -> torch.Tensor | None:
        return None if getattr(samples[0], name) is None else joined(name)

    lengths = tuple(len(sample.token_ids) for sample in samples)
    return MicroBatch(
        token_ids_T=joined("token_ids").long(),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        mask_T=joined("loss_mask").bool(),
        sampled_logprobs_T=joined("logprobs"),
        advantages_T=joined("advantage"),
        weights_T=torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(lengths)),
        prev_logprobs_T=joined_if_there("prev_logprobs"),
        reference_logprobs_T=joined_if_there("reference_logprobs"),
    )
