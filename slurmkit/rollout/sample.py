"""The data carrier between rollouts and training."""

from __future__ import annotations

from dataclasses import dataclass

from slurmkit.generation.engine import FinishReason


@dataclass(frozen=True, slots=True)
class Sample:
    """One trainable token sequence. Arrays have one entry per token; there is no padding and no text.

    `loss_mask` is 1 where the policy chose the token, 0 for prompts, tool output and template glue. `logprobs` are
    those of the distribution that was sampled from (0 where the mask is 0); `advantage` belongs to the whole sequence
    until `rollout_id`'s group is known, and is repeated per token so that later turns may earn differently.

    Example, a prompt of two tokens answered by two, in a group where this answer was better than most:

        Sample(
            token_ids=(256, 55, 49, 257), loss_mask=(0, 0, 1, 1), logprobs=(0.0, 0.0, -0.7, -0.1),
            advantage=(0.0, 0.0, 1.3, 1.3), group_id=12, rollout_id=195, temperature=1.0, weight_version=3,
            finish_reason="stop",
        )
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: tuple[float, ...]
    group_id: int
    rollout_id: int
    temperature: float
    weight_version: int
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        lengths = {
            "token_ids": len(self.token_ids),
            "loss_mask": len(self.loss_mask),
            "logprobs": len(self.logprobs),
            "advantage": len(self.advantage),
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a sample's arrays must be equally long, found {lengths}")
        if self.loss_mask[:1] == (1,):
            raise ValueError("a sample's first token follows from nothing, so it cannot be trained on")

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that the loss counts."""
        return sum(self.loss_mask)
