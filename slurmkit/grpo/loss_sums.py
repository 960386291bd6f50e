"""What a micro-batch leaves of its loss for the metrics. Shapes: T positions of packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from operator import add

import torch

from slurmkit.config.algorithm import LossFn


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over trained tokens, detached, so that micro-batches, ranks and optimiser steps add up: `a + b`."""

    tokens: float = 0.0
    sequences: float = 0.0
    loss: float = 0.0
    policy_loss: float = 0.0
    ratio: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    clipped_dual: float = 0.0
    approximate_kl: float = 0.0
    reference_kl: float = 0.0
    entropy: float = 0.0
    probability_error: float = 0.0
    engine_kl: float = 0.0
    correction: float = 0.0
    out_of_bounds: float = 0.0
    sequence_correction: float = 0.0
    sequences_out_of_bounds: float = 0.0
    ratio_min: float = inf
    """The least, not a sum."""
    ratio_max: float = -inf
    """The largest, not a sum."""

    @classmethod
    def over(cls, mask_T: torch.Tensor, values_T: Mapping[str, torch.Tensor], ratio_T: torch.Tensor) -> LossSums:
        """Of what each field's tokens have, where the mask is true."""
        sums = [torch.where(mask_T, each_T.float(), 0.0).sum() for each_T in values_T.values()]
        least = torch.where(mask_T, ratio_T.float(), inf).min()
        most = torch.where(mask_T, ratio_T.float(), -inf).max()
        # One transfer for all: each would wait for the device.
        return cls(
            **dict(zip([*values_T, "ratio_min", "ratio_max"], torch.stack([*sums, least, most]).tolist(), strict=True))
        )

    def __add__(self, other: LossSums) -> LossSums:
        how = {"ratio_min": min, "ratio_max": max}
        names = [field.name for field in fields(self)]
        return LossSums(**{name: how.get(name, add)(getattr(self, name), getattr(other, name)) for name in names})

    def metrics(self, loss_fn: LossFn, num_steps: int) -> dict[str, float]:
        """Means over the trained tokens of `num_steps` optimiser steps, with their names in metrics.jsonl.

        The losses are means over optimiser steps, each with its own denominator.
        """
        return {
            "train:loss": self.loss / num_steps,
            "train:policy_loss": self.policy_loss / num_steps,
            "train:ratio_mean": self.ratio / self.tokens,
            "train:ratio_min": self.ratio_min,
            "train:ratio_max": self.ratio_max,
            "train:clip_fraction": (self.clipped_low + self.clipped_high) / self.tokens,
            "train:clip_fraction_low": self.clipped_low / self.tokens,
            "train:clip_fraction_high": self.clipped_high / self.tokens,
            **({"train:clip_fraction_dual": self.clipped_dual / self.tokens} if loss_fn.ratio_clip_c else {}),
            "train:approx_kl": self.approximate_kl / self.tokens,
            **({"train:kl_penalty": self.reference_kl / self.tokens} if loss_fn.kl_penalty_in_loss else {}),
            "train:entropy": self.entropy / self.tokens,
        }

    def engine_metrics(self, loss_fn: LossFn) -> dict[str, float]:
        """How far the engine's logprobs are from the policy's own for the same weights, per trained token."""
        weight = self.correction / self.tokens
        if loss_fn.corrects_sequences:
            weight = self.sequence_correction / self.sequences
        metrics = {
            "train:token_mult_prob_error": self.probability_error / self.tokens,
            "train:gen_kl_error": self.engine_kl / self.tokens,
            "train:sampling_importance_ratio": weight,
        }
        if loss_fn.truncated_importance_sampling_type == "seq-mask-tis":  # keeps or drops whole sequences
            metrics["train:is_oob_ratio"] = self.sequences_out_of_bounds / self.sequences
        elif loss_fn.truncated_importance_sampling_type:
            metrics["train:is_oob_ratio"] = self.out_of_bounds / self.tokens
        return metrics
