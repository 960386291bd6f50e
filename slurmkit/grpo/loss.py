"""The policy loss: a pure function of tensors, with its denominators passed in.

Shapes: T positions of packed sequences. Position t of every array belongs to token t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# exp(20) is far outside every clip range, and its gradient is still finite.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over trained tokens, detached, so that micro-batches and ranks add up to the whole batch's figures."""

    loss: float
    ratio: float
    clipped: float
    approximate_kl: float
    probability_error: float

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            self.loss + other.loss,
            self.ratio + other.ratio,
            self.clipped + other.clipped,
            self.approximate_kl + other.approximate_kl,
            self.probability_error + other.probability_error,
        )


def clipped_policy_loss(
    logprobs_T: torch.Tensor,
    sampled_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    weights_T: torch.Tensor,
    *,
    clip_min: float,
    clip_max: float,
) -> tuple[torch.Tensor, LossSums]:
    """GRPO's clipped surrogate without its KL term (arXiv 2402.03300, equation 3), with DAPO's separate clip bounds
    (arXiv 2503.14476, equation 10).

    `logprobs_T` carries the gradient; `sampled_logprobs_T` are the engine's. `mask_T` is 1 where the loss counts;
    what the other positions hold never matters, not even NaN. `weights_T` hold the denominator of the whole
    optimiser step, over all micro-batches and ranks, so any split of it gives the same gradient.

    Returns the scalar loss and the sums behind this call's metrics.
    """
    counts_T = mask_T.bool()
    # Zeroed before any arithmetic: a NaN behind a mask of 0 would still turn the gradient into NaN.
    logprobs_T = torch.where(counts_T, logprobs_T, 0.0)
    sampled_logprobs_T = torch.where(counts_T, sampled_logprobs_T, 0.0)
    advantages_T = torch.where(counts_T, advantages_T, 0.0)

    log_ratio_T = (logprobs_T - sampled_logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1 - clip_min, 1 + clip_max)
    loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    # Masked positions have advantage 0; multiplying all the same keeps a graph where nothing counts, and a rank
    # whose micro-batch is empty takes part in FSDP's collectives.
    loss = (loss_T * weights_T * counts_T).sum()

    with torch.no_grad():
        error_T = log_ratio_T.abs().exp()
        # k3 (Schulman 2020, "Approximating KL divergence"): never negative, and unbiased for KL(sampled || policy).
        kl_T = ratio_T - 1 - log_ratio_T
        binding_T = ratio_T * advantages_T > clipped_T * advantages_T
        sums = LossSums(
            loss=float(loss),
            ratio=float((ratio_T * counts_T).sum()),
            clipped=float((binding_T & counts_T).sum()),
            approximate_kl=float((kl_T * counts_T).sum()),
            probability_error=float((error_T * counts_T).sum()),
        )
    return loss, sums
