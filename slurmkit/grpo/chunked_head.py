"""Logprobs and entropy from hidden states, so that the logits of all positions never exist at once.

Shapes: T positions, M of them whose successors' logprobs are wanted, C of those in a chunk, D width of the model,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Logits of a chunk whose size is not given: 32 MiB in float32 stay near a CPU's caches; on a GPU every chunk reads and
# writes the weight's whole gradient, which 1 GiB of logits make small.
_CPU_LOGITS, _GPU_LOGITS = 1 << 23, 1 << 28


@dataclass(frozen=True, slots=True)
class LogitsForm:
    """What happens to `hidden @ weight.T`: times `scale`, then softly capped (Gemma 2, arXiv 2408.00118, section 2),
    then divided by `temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def chunked_logprobs(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    positions_M: torch.Tensor,
    target_ids_M: torch.Tensor,
    form: LogitsForm = LogitsForm(),
    *,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Natural log-probability of each target, and the entropy of the distribution it was drawn from, in nats.

    `target_ids_M` are the tokens that follow the hidden states at `positions_M`, of which each occurs once: the caller
    has shifted them. At most `chunk_size` positions have logits at a time, which backward computes once more; None is
    as many as fill 32 MiB, on a GPU 1 GiB. Both results are [M], in float32 or the model's own type if that is finer,
    and carry gradients, which for the weight are added up in that type.
    """
    logprobs_M, entropy_M = _ChunkedLogprobs.apply(hidden_TD, weight_VD, positions_M, target_ids_M, form, chunk_size)  # type: ignore[no-untyped-call]
    return logprobs_M, entropy_M


def _product(left: torch.Tensor, right: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """left @ right in `kind`, without rounding to the factors' type on the way."""
    if left.dtype == right.dtype == kind:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=kind)
    return left.to(kind) @ right.to(kind)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, added up in the total's type."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right, total.dtype)


def _logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, form: LogitsForm, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits_CV and, where they are capped, the derivative of the cap."""
    logits_CV = _product(hidden_CD, weight_VD.T, kind).mul_(form.scale)
    slope_CV = None
    if form.softcap is not None:
        logits_CV.div_(form.softcap).tanh_()
        slope_CV = 1 - logits_CV.square()
        logits_CV.mul_(form.softcap)
    return logits_CV.div_(form.temperature), slope_CV


def _chunks(positions_M: torch.Tensor, vocabulary: int, chunk_size: int | None) -> Iterator[slice]:
    size = chunk_size or max(1, (_GPU_LOGITS if positions_M.is_cuda else _CPU_LOGITS) // vocabulary)
    return (slice(first, first + size) for first in range(0, len(positions_M), size))


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        positions_M: torch.Tensor,
        target_ids_M: torch.Tensor,
        form: LogitsForm,
        chunk_size: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = torch.promote_types(hidden_TD.dtype, torch.float32)
        logprobs_M, entropy_M, log_sum_M = hidden_TD.new_empty(3, len(positions_M), dtype=kind)
        for part in _chunks(positions_M, len(weight_VD), chunk_size):
            logits_CV, _ = _logits(hidden_TD[positions_M[part]], weight_VD, form, kind)
            highest_C1 = logits_CV.amax(-1, keepdim=True)
            logits_CV.sub_(highest_C1)
            picked_C = logits_CV.gather(-1, target_ids_M[part, None])[:, 0]
            exp_CV = logits_CV.exp()
            sum_C = exp_CV.sum(-1)
            logprobs_M[part] = picked_C - sum_C.log()
            # -sum(p log p), with log p = logit - log(sum)
            entropy_M[part] = sum_C.log() - exp_CV.mul_(logits_CV).sum(-1) / sum_C
            log_sum_M[part] = highest_C1[:, 0] + sum_C.log()
        ctx.save_for_backward(hidden_TD, weight_VD, positions_M, target_ids_M, entropy_M, log_sum_M)
        ctx.form, ctx.chunk_size, ctx.kind = form, chunk_size, kind
        ctx.set_materialize_grads(False)
        return logprobs_M, entropy_M

    @staticmethod
    def backward(ctx: Any, d_logprobs_M: torch.Tensor | None, d_entropy_M: torch.Tensor | None) -> Any:
        hidden_TD, weight_VD, positions_M, target_ids_M, entropy_M, log_sum_M = ctx.saved_tensors
        kind, form = ctx.kind, ctx.form
        d_hidden_TD = torch.zeros_like(hidden_TD)
        d_weight_VD = torch.zeros_like(weight_VD, dtype=kind) if ctx.needs_input_grad[1] else None
        if d_logprobs_M is None:
            d_logprobs_M = torch.zeros_like(entropy_M)
        for part in _chunks(positions_M, len(weight_VD), ctx.chunk_size):
            d_logprobs_C1 = d_logprobs_M[part, None]
            hidden_CD = hidden_TD[positions_M[part]]
            logits_CV, slope_CV = _logits(hidden_CD, weight_VD, form, kind)
            logprobs_CV = logits_CV.sub_(log_sum_M[part, None])
            # d logprob / d logit = (1 where it is the target) - p;  d entropy / d logit = -p (log p + entropy)
            d_logits_CV = logprobs_CV.exp()
            if d_entropy_M is None:
                d_logits_CV.mul_(-d_logprobs_C1)
            else:
                logprobs_CV.add_(entropy_M[part, None]).mul_(d_entropy_M[part, None]).add_(d_logprobs_C1)
                d_logits_CV.mul_(logprobs_CV).neg_()
            d_logits_CV.scatter_add_(-1, target_ids_M[part, None], d_logprobs_C1)
            d_logits_CV.mul_(form.scale / form.temperature)
            if slope_CV is not None:
                d_logits_CV.mul_(slope_CV)
            d_logits_CV = d_logits_CV.to(hidden_TD.dtype)
            d_hidden_TD[positions_M[part]] = d_logits_CV @ weight_VD
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits_CV.T, hidden_CD)
        return d_hidden_TD, d_weight_VD, None, None, None, None
