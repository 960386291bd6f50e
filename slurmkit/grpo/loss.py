"""The policy loss: a pure function of tensors, with its denominator passed in.

Shapes: B sequences, T positions. Position t of every array belongs to token t of the sequence.
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


def token_logprobs(logits_BTV: torch.Tensor, token_ids_BT: torch.Tensor, temperature: float) -> torch.Tensor:
    """Natural log-probability of every token given those before it, in float32: [B, T], 0 at the first position.

    `temperature` must be the one that the tokens were sampled at, or ratios start away from 1.
    """
    logits_BTV = logits_BTV[:, :-1].float() / temperature
    picked_BT = logits_BTV.gather(-1, token_ids_BT[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(picked_BT - logits_BTV.logsumexp(-1), (1, 0))


def clipped_policy_loss(
    logprobs_BT: torch.Tensor,
    sampled_logprobs_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    num_valid_tokens: int,
    clip_min: float,
    clip_max: float,
) -> tuple[torch.Tensor, LossSums]:
    """GRPO's clipped surrogate without its KL term (arXiv 2402.03300, equation 3), averaged over tokens as in DAPO
    (arXiv 2503.14476, equations 8 and 10: token-level mean, separate clip bounds).

    `logprobs_BT` carries the gradient; `sampled_logprobs_BT` are the engine's. `mask_BT` is 1 where the loss counts;
    what the other positions hold never matters, not even NaN. `num_valid_tokens` counts the trained tokens of the
    whole optimiser step, over all micro-batches and ranks, so any split of it gives the same gradient.

    Returns the scalar loss and the sums behind this call's metrics.
    """
    counts_BT = mask_BT.bool()
    # Zeroed before any arithmetic: a NaN behind a mask of 0 would still turn the gradient into NaN.
    logprobs_BT = torch.where(counts_BT, logprobs_BT, 0.0)
    sampled_logprobs_BT = torch.where(counts_BT, sampled_logprobs_BT, 0.0)
    advantages_BT = torch.where(counts_BT, advantages_BT, 0.0)

    log_ratio_BT = (logprobs_BT - sampled_logprobs_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_min, 1 + clip_max)
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    # Masked positions have advantage 0; multiplying all the same keeps a graph where nothing counts, and a rank
    # whose micro-batch is empty takes part in FSDP's collectives.
    loss = (loss_BT * counts_BT).sum() / num_valid_tokens

    with torch.no_grad():
        error_BT = log_ratio_BT.abs().exp()
        # k3 (Schulman 2020, "Approximating KL divergence"): never negative, and unbiased for KL(sampled || policy).
        kl_BT = ratio_BT - 1 - log_ratio_BT
        binding_BT = ratio_BT * advantages_BT > clipped_BT * advantages_BT
        sums = LossSums(
            loss=float(loss),
            ratio=float((ratio_BT * counts_BT).sum()),
            clipped=float((binding_BT & counts_BT).sum()),
            approximate_kl=float((kl_BT * counts_BT).sum()),
            probability_error=float((error_BT * counts_BT).sum()),
        )
    return loss, sums
