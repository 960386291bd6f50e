"""RoPE whose frequencies transformers picks by the largest position of a call (`modeling_rope_utils`).

`longrope` has two sets of frequencies, for sequences within and beyond the model's original context. `dynamic` has the
original ones within it, and others for each length beyond. Sequences are therefore packed only with those that have
the same frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class RopeSides:
    """Groups sequences by the frequencies that each would have alone."""

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        """`config` is the one of the text model."""
        self._dynamic, self._long = _contexts(config)
        self._modules = [each for each in model.modules() if hasattr(each, "max_seq_len_cached")]

    @property
    def depend_on_length(self) -> bool:
        """True if the frequencies of a sequence follow its length."""
        return bool(self._dynamic or self._long)

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the indices of the sequences, those with the same frequencies together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, length in enumerate(lengths):
            key = (*(max(length, most) for most in self._dynamic), *(int(length > most) for most in self._long))
            groups.setdefault(key, []).append(index)
        return list(groups.values())

    def forget(self) -> None:
        """Restore the original frequencies, as `dynamic` keeps those of the longest sequence so far.

        The `longrope` of a kind of layers (transformers 5.19) fails on its second long call if it finds its first
        one's frequencies.
        """
        for module in self._modules if self.depend_on_length else ():
            for name in [name for name in module._buffers if name.endswith("original_inv_freq")]:
                setattr(module, name.replace("original_inv_freq", "inv_freq"), getattr(module, name))
            for name in list(vars(module)):
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, module.original_max_seq_len)
                elif name.endswith("long_inv_freq"):
                    delattr(module, name)


def exact_length(config: Any) -> int | None:
    """Return the longest sequence for which engines and policy use the same frequencies, or None if any is."""
    return min((length for lengths in _contexts(config) for length in lengths), default=None)


def _contexts(config: Any) -> tuple[list[int], list[int]]:
    """Return the original contexts of the `dynamic` and of the `longrope` layers."""
    dynamic, long = list[int](), list[int]()
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", "default"))
        if "dynamic" in kind:
            dynamic.append(int(config.max_position_embeddings))
        elif kind == "longrope":
            long.append(int(rope["original_max_position_embeddings"]))
    return dynamic, long


def original_context(config: Any) -> int | None:
    """Return the longest sequence with the original frequencies, or None for a model without RoPE."""
    ropes = _ropes(config)
    known = [int(rope.get("original_max_position_embeddings") or 0) for rope in ropes]
    return max(*known, int(config.max_position_embeddings)) if ropes else None


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the RoPE parameters of the model, or those of each of its kinds of layers."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in found:
        return [found]
    return [rope for rope in found.values() if isinstance(rope, Mapping)]
