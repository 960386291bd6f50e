"""The policy loss: a pure function of tensors, whose denominators come with the batch.

Shapes: T positions of packed sequences. Position t of every tensor belongs to token t.
"""

from __future__ import annotations

import torch

from slurmkit.config.algorithm import LossFn
from slurmkit.grpo.batch import MicroBatch
from slurmkit.grpo.importance import MAX_LOG_RATIO, bounded_exp, engine_correction, sequence_means, sequence_shares
from slurmkit.grpo.kl import reference_kl
from slurmkit.grpo.loss_sums import LossSums


def policy_loss(
    logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: MicroBatch, loss_fn: LossFn
) -> tuple[torch.Tensor, LossSums]:
    """A micro-batch's part of an optimiser step's loss, and of the sums behind its metrics.

        sum over trained tokens of weight × (correction × surrogate + penalty × KL − bonus × entropy)

    `logprobs_T` and `entropy_T` carry the gradient, in nats, float32; the batch's tensors are on their device. The
    weights hold the denominator of the whole optimiser step, over all micro-batches and ranks, so any split of it
    gives the same loss and gradient: only add up. What stands where the mask is false never matters, not even NaN,
    and where nothing is trained the loss is a 0 with a graph, so that the rank takes part in FSDP's collectives.

    The surrogate is GRPO's (arXiv 2402.03300, equation 3) with the options of `loss_fn`; docs/losses.md has each with
    its formula and paper. ValueError where the batch lacks logprobs that `loss_fn` asks for.
    """
    mask_T = batch.mask_T

    def trained(values_T: torch.Tensor | None, name: str = "") -> torch.Tensor:
        if values_T is None:
            raise ValueError(f"the loss needs the samples' {name}, and they have none")
        # Zeroed before any arithmetic: a NaN behind a factor of 0 would still turn the gradient into NaN.
        return torch.where(mask_T, values_T, 0.0)

    logprobs_T, entropy_T = trained(logprobs_T), trained(entropy_T)
    sampled_T = trained(batch.sampled_logprobs_T)
    advantages_T, weights_T = trained(batch.advantages_T), trained(batch.weights_T)
    prev_T = trained(batch.prev_logprobs_T, "prev_logprobs") if loss_fn.needs_prev_logprobs else logprobs_T.detach()
    old_T = prev_T if loss_fn.use_importance_sampling_correction or loss_fn.force_on_policy_ratio else sampled_T
    log_ratio_T = logprobs_T - old_T
    if loss_fn.sequence_level_importance_ratios:
        # GSPO-token (arXiv 2507.18071, equation 14): the sequence's value, and each token's own gradient. Where all
        # tokens of a sequence have one advantage, that is GSPO's gradient (equation 10).
        means_T = sequence_means(log_ratio_T.detach(), mask_T, batch.lengths)
        log_ratio_T = means_T + (logprobs_T - logprobs_T.detach())
    ratio_T = bounded_exp(log_ratio_T)

    correction_T, is_out_T = engine_correction(prev_T - sampled_T, mask_T, batch.lengths, loss_fn)
    surrogate_T, clips = _surrogate(logprobs_T, ratio_T, advantages_T, loss_fn)
    if loss_fn.use_importance_sampling_correction:
        surrogate_T = surrogate_T * correction_T
    loss_T = surrogate_T
    kl_T = torch.zeros_like(sampled_T)
    if loss_fn.kl_penalty_in_loss:
        reference_T = trained(batch.reference_logprobs_T, "reference_logprobs")
        drift_T = logprobs_T - sampled_T if loss_fn.use_on_policy_kl_approximation else None
        kl_T = reference_kl(logprobs_T, reference_T, loss_fn, drift_T)
        loss_T = loss_T + loss_fn.kl_penalty_in_loss * kl_T
    if loss_fn.entropy_bonus:
        loss_T = loss_T - loss_fn.entropy_bonus * entropy_T
    loss = (loss_T * weights_T).sum()

    with torch.no_grad():
        shares_T = sequence_shares(mask_T, batch.lengths)
        sums = LossSums.over(
            mask_T,
            {
                "tokens": torch.ones_like(weights_T),
                "sequences": shares_T,
                "loss": loss_T * weights_T,
                "policy_loss": surrogate_T * weights_T,
                "ratio": ratio_T,
                **clips,
                "approximate_kl": _k3(log_ratio_T),
                "reference_kl": kl_T,
                "entropy": entropy_T,
                "probability_error": bounded_exp((prev_T - sampled_T).abs()),
                "engine_kl": _k3(prev_T - sampled_T),
                "correction": correction_T,
                "out_of_bounds": is_out_T,
                "sequence_correction": correction_T * shares_T,
                "sequences_out_of_bounds": is_out_T * shares_T,
            },
            ratio_T,
        )
    return loss, sums


def _surrogate(
    logprobs_T: torch.Tensor, ratio_T: torch.Tensor, advantages_T: torch.Tensor, loss_fn: LossFn
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What is minimised in place of the negative return, and where each of its clips binds."""
    is_low_T, is_high_T = ratio_T < 1 - loss_fn.ratio_clip_min, ratio_T > 1 + loss_fn.ratio_clip_max
    clipped_T = ratio_T.clamp(1 - loss_fn.ratio_clip_min, 1 + loss_fn.ratio_clip_max)
    is_dual_T = torch.zeros_like(is_low_T)
    if loss_fn.disable_ppo_ratio:
        loss_T = -advantages_T * logprobs_T
        is_low_T = is_high_T = is_dual_T
    elif loss_fn.use_cispo:
        loss_T = -advantages_T * clipped_T.detach() * logprobs_T
    else:
        loss_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
        is_low_T, is_high_T = is_low_T & (advantages_T < 0), is_high_T & (advantages_T > 0)
        if loss_fn.ratio_clip_c is not None:
            bound_T = -loss_fn.ratio_clip_c * advantages_T
            is_dual_T = (advantages_T < 0) & (loss_T > bound_T)
            loss_T = torch.where(is_dual_T, bound_T, loss_T)
    return loss_T, {"clipped_low": is_low_T, "clipped_high": is_high_T, "clipped_dual": is_dual_T}


def _k3(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Never negative, and unbiased for KL(old || new) where `log_ratio_T` is new minus old (Schulman 2020)."""
    bounded_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return bounded_T.expm1() - bounded_T
