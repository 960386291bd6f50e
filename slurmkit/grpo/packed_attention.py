"""Causal attention over sequences that lie end to end, registered with transformers under the name `packed`.

Its work is the sum of the squares of the sequences' lengths, and no mask over all positions ever exists. On CUDA it is
torch's flash attention for variable lengths; elsewhere queries, keys and values, and nothing else of the model, are
laid out in rows of like length.

Shapes: T positions of packed sequences, P positions of the padded rows, S sequences, H heads, D width of a head,
N rows of L positions in one bucket.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "packed"

# Scores that a bucket computes for nothing, at most, for each head: about what another call of the kernel costs.
_WASTED_SCORES = 1 << 17

# What some models add to the scores; these need their own attention.
_OTHER_ARGUMENTS = ("softcap", "s_aux", "position_bias", "cache")


class NotPackable(NotImplementedError):
    """This model's attention is more than causal attention, so its sequences cannot lie in one row."""


@dataclass(frozen=True)
class Packing:
    """Where each sequence lies, in the forms that the kernels want; each is made when it is first asked for.

    Example, sequences of 2 and 3 tokens: cumulative_S1 [0, 2, 5]; one bucket of (2, 3) rows, longest first, whose
    source_P is [2, 3, 4, 0, 1, 1]: the last token of a short row stands in its padding, which nothing that counts sees.
    """

    lengths: tuple[int, ...]
    device: torch.device
    _bands: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def cumulative_S1(self) -> torch.Tensor:
        """Where sequences start, and T: int32, as flash attention wants it."""
        return torch.tensor([0, *numpy.cumsum(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def buckets(self) -> list[tuple[int, int]]:
        """Rows and their length, longest first."""
        lengths = numpy.sort(self.lengths)[::-1]
        buckets: list[tuple[int, int]] = []
        first, wasted = 0, 0
        for index, length in enumerate(lengths.tolist()):
            longest = int(lengths[first])
            wasted += longest**2 - length**2
            if wasted > _WASTED_SCORES:
                buckets.append((index - first, longest))
                first, wasted = index, 0
        return [*buckets, (len(lengths) - first, int(lengths[first]))]

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """source_P, what lies where in the rows; real_P, false in their padding; target_T, the way back.

        None where the rows lie like the sequences: all are equally long.
        """
        if len(set(self.lengths)) == 1:
            return None
        lengths = numpy.asarray(self.lengths)
        starts = numpy.cumsum(lengths) - lengths
        order = numpy.argsort(-lengths, kind="stable")
        sources, reals, first = [], [], 0
        for rows, longest in self.buckets:
            chosen = order[first : first + rows, None]
            column = numpy.arange(longest)
            sources.append((starts[chosen] + numpy.minimum(column, lengths[chosen] - 1)).ravel())
            reals.append((column < lengths[chosen]).ravel())
            first += rows
        source_P, real_P = numpy.concatenate(sources), numpy.concatenate(reals)
        target_T = numpy.empty(lengths.sum(), numpy.int64)
        target_T[source_P[real_P]] = numpy.flatnonzero(real_P)
        return tuple(torch.from_numpy(array).to(self.device) for array in (source_P, real_P, target_T))  # type: ignore[return-value]

    def band(self, length: int, window: int) -> torch.Tensor:
        """[L, L], true where a query sees a key: itself and the `window` - 1 positions before it."""
        if (length, window) not in self._bands:
            ones = torch.ones(length, length, dtype=torch.bool, device=self.device)
            self._bands[length, window] = ones.tril().triu(1 - window)
        return self._bands[length, window]


class _ToRows(torch.autograd.Function):
    """[T, H, D] to [P, H, D]. Padding gets no gradient, as nothing that counts sees it, so the way back is a gather."""

    @staticmethod
    def forward(ctx: Any, x_THD: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return x_THD.index_select(0, packing.padded[0])  # type: ignore[index]

    @staticmethod
    def backward(ctx: Any, gradient_PHD: torch.Tensor) -> Any:
        return gradient_PHD.index_select(0, ctx.packing.padded[2]), None


class _FromRows(torch.autograd.Function):
    """[P, H, D] to [T, H, D], leaving padding out."""

    @staticmethod
    def forward(ctx: Any, x_PHD: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return x_PHD.index_select(0, packing.padded[2])  # type: ignore[index]

    @staticmethod
    def backward(ctx: Any, gradient_THD: torch.Tensor) -> Any:
        source_P, real_P, _ = ctx.packing.padded
        return gradient_THD.index_select(0, source_P).mul_(real_P[:, None, None]), None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' AttentionInterface calls: tensors are [1, H, T, D], the result is [1, T, H, D].

    `packing` is passed to the model's forward, which hands it on. Dropout is never applied. NotPackable where the
    model wants more than this.
    """
    if packing is None or attention_mask is not None or len(query) != 1:
        raise NotPackable(f"{type(module).__name__} does not hand on how its sequences are packed")
    if found := [name for name in _OTHER_ARGUMENTS if others.get(name) is not None]:
        raise NotPackable(f"{type(module).__name__} asks for {', '.join(found)}")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise NotPackable(f"{type(module).__name__} is not causal")
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < max(packing.lengths) else None
    attend = _flash if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _rows
    return attend(query_THD, key_THD, value_THD, packing, scaling, window)[None], None


def _flash(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    longest = max(packing.lengths)
    result = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        packing.cumulative_S1,
        packing.cumulative_S1,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_THD.shape[1] != key_THD.shape[1],
    )
    assert isinstance(result, torch.Tensor)
    return result


def _rows(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    padded = packing.padded is not None
    sizes = [rows * length for rows, length in packing.buckets]
    tensors: list[Any] = [query_THD, key_THD, value_THD]
    if padded:
        tensors = [_ToRows.apply(x_THD, packing) for x_THD in tensors]  # type: ignore[no-untyped-call]
    results = []
    for (rows, length), *parts in zip(packing.buckets, *(x_PHD.split(sizes) for x_PHD in tensors), strict=True):
        query_NHLD, key_NHLD, value_NHLD = (part.unflatten(0, (rows, length)).transpose(1, 2) for part in parts)
        band = packing.band(length, window) if window is not None and window < length else None
        result_NHLD = scaled_dot_product_attention(
            query_NHLD,
            key_NHLD,
            value_NHLD,
            attn_mask=band,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=query_NHLD.shape[1] != key_NHLD.shape[1],
        )
        results.append(result_NHLD.transpose(1, 2).flatten(0, 1))
    result: Any = torch.cat(results) if len(results) > 1 else results[0]
    return _FromRows.apply(result, packing) if padded else result  # type: ignore[no-any-return, no-untyped-call]


AttentionInterface.register(NAME, packed_attention)
