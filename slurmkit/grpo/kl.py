"""The KL divergence from the reference model, token by token. Shapes: T positions of packed sequences."""

from __future__ import annotations

import torch

from slurmkit.config.algorithm import LossFn
from slurmkit.grpo.importance import bounded_exp


def reference_kl(
    logprobs_T: torch.Tensor, reference_T: torch.Tensor, loss_fn: LossFn, drift_T: torch.Tensor | None = None
) -> torch.Tensor:
    """An estimate of KL(policy || reference) in nats from each sampled token, with the KL's own gradient.

    The values are Schulman's (2020, "Approximating KL divergence") with r = reference / policy: k1 = −log r, unbiased;
    k2 = (log r)²/2, biased, never negative; k3 = r − 1 − log r, both. Differentiating them is another matter: k1's
    gradient is 0 in expectation, k3's that of KL(reference || policy), as they miss that the policy also chose the
    token (arXiv 2506.09477, 2512.21852). k2's gradient, −log r ∇log policy, is the KL's, and what k1 and k3 have once
    the score function is added (k1 but for a term of mean 0): so all three have k2's here.

    What a token does to the KL of later ones is in no token's estimate, here as everywhere; use_kl_in_reward has it.

    `drift_T`, policy minus engine, makes it the KL of the present policy where the tokens were sampled by an older one:
    each token weighs exp() of it.
    """
    bound = loss_fn.kl_input_clamp_value
    log_ratio_T = reference_T - logprobs_T
    if bound is not None:
        log_ratio_T = log_ratio_T.clamp(-bound, bound)
    k2_T = log_ratio_T.square() / 2
    values = {"k1": -log_ratio_T, "k2": k2_T, "k3": log_ratio_T.expm1() - log_ratio_T}
    value_T = values[loss_fn.reference_policy_kl_type]
    kl_T = value_T.detach() + (k2_T - k2_T.detach())
    if drift_T is not None:
        kl_T = kl_T * bounded_exp(drift_T.detach())
    limit = loss_fn.kl_output_clamp_value
    return kl_T if limit is None else kl_T.clamp(-limit, limit)
