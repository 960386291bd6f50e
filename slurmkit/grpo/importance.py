"""Importance ratios of sequences, and the weight of the difference between engine and trainer.

Shapes: T positions of packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slurmkit.config.algorithm import LossFn

# exp(20) is far outside every clip range, and its gradient is still finite.
MAX_LOG_RATIO = 20.0


def bounded_exp(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """exp() that neither overflows nor has a gradient where it would."""
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_sums(values_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """At every position, the sum over its sequence."""
    count = torch.tensor(lengths, device=values_T.device)
    # Not index_add: on a GPU that adds in any order, and a resumed run would differ in the last bit.
    sums = torch.segment_reduce(values_T, "sum", lengths=count)
    return sums.repeat_interleave(count, output_size=len(values_T))


def sequence_means(values_T: torch.Tensor, mask_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """At every position, the mean over its sequence's trained tokens. The values are 0 where the mask is false."""
    return sequence_sums(values_T, lengths) / sequence_sums(mask_T.float(), lengths).clamp(min=1)


def sequence_shares(mask_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return 1 / n at each of a sequence's n trained tokens, so that a sum over tokens counts sequences."""
    return mask_T / sequence_sums(mask_T.float(), lengths).clamp(min=1)


@torch.no_grad()
def engine_correction(
    log_weight_T: torch.Tensor, mask_T: torch.Tensor, lengths: Sequence[int], loss_fn: LossFn
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a token's loss is multiplied by as the engine sampled from other logprobs than the policy has for the same
    weights, and whether that was out of bounds.

    `log_weight_T` is policy minus engine, 0 where the mask is false. The weight is exp() of it, or of its sum over the
    sequence, before the bounds: `tis` clamps (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"), `mis` and `icepop` make it 0 (Liu et al. 2025, "When speed kills stability"; Ling Team
    2025, arXiv 2510.18855), `seq-mask-tis` makes it 0 in sequences whose geometric mean is outside (NeMo RL).
    """
    if loss_fn.corrects_sequences:
        log_weight_T = sequence_sums(log_weight_T, lengths)
    weight_T = judged_T = bounded_exp(log_weight_T)
    kind = loss_fn.truncated_importance_sampling_type
    if kind == "seq-mask-tis":
        judged_T = bounded_exp(sequence_means(log_weight_T, mask_T, lengths))
    low = loss_fn.truncated_importance_sampling_ratio_min or 0.0
    high = loss_fn.truncated_importance_sampling_ratio or torch.inf
    is_out_T = (judged_T < low) | (judged_T > high)
    if kind == "tis":
        return weight_T.clamp(low, high), is_out_T
    return torch.where(is_out_T, 0.0, weight_T), is_out_T
