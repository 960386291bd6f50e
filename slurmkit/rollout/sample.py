"""The data carrier between rollouts and training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy
from numpy.typing import NDArray

from slurmkit.rollout.episode import EpisodeEnd


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One trainable token sequence. Arrays have one entry per token; there is no padding and no text.

    `loss_mask` is true where the policy chose the token, false for prompts, tool output and template glue. `logprobs`
    are those of the distribution that was sampled from (0 where the mask is false); `advantage` is repeated per token
    so that later turns may earn differently. Samples of one episode share its `rollout_id`. `weight_version` is the
    oldest of the tokens'.

    Example, a prompt of two tokens answered by two, in a group where this answer was better than most:

        Sample(
            token_ids=numpy.array([256, 55, 49, 257], numpy.int32),
            loss_mask=numpy.array([False, False, True, True]),
            logprobs=numpy.array([0, 0, -0.7, -0.1], numpy.float32),
            advantage=numpy.array([0, 0, 1.3, 1.3], numpy.float32),
            group_id=12, rollout_id=195, temperature=1.0, weight_version=3, finish_reason="stop",
        )
    """

    token_ids: NDArray[numpy.int32]
    loss_mask: NDArray[numpy.bool_]
    logprobs: NDArray[numpy.float32]
    advantage: NDArray[numpy.float32]
    group_id: int
    rollout_id: int
    temperature: float
    weight_version: int
    finish_reason: EpisodeEnd
    """The episode's."""
    prev_logprobs: NDArray[numpy.float32] | None = None
    """The policy's own, before the step's first update, where the loss asks for them."""
    reference_logprobs: NDArray[numpy.float32] | None = None
    """The reference model's, where the loss or the reward asks for them."""

    num_trained_tokens: int = field(init=False)
    """Tokens that the loss counts."""

    def __post_init__(self) -> None:
        # Made twice for every episode of a step, so each check is a plain comparison.
        length, prev, reference = len(self.token_ids), self.prev_logprobs, self.reference_logprobs
        if (
            not length == len(self.loss_mask) == len(self.logprobs) == len(self.advantage)
            or (prev is not None and len(prev) != length)
            or (reference is not None and len(reference) != length)
        ):
            named = ((each.name, getattr(self, each.name)) for each in fields(self) if each.init)
            found = {name: len(value) for name, value in named if isinstance(value, numpy.ndarray)}
            raise ValueError(f"a sample's arrays must be equally long, found {found}")
        if length and self.loss_mask[0]:
            raise ValueError("a sample's first token follows from nothing, so it cannot be trained on")
        object.__setattr__(self, "num_trained_tokens", int(numpy.count_nonzero(self.loss_mask)))
