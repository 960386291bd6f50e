"""Rank 0's part of a checkpoint: a copy of the training state, written by a thread while the training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from slurmkit.grpo.checkpoint import digests_of, flush


class Writer:
    """Writes one copy at a time. What it does in C, which is nearly all, does not hold the interpreter's lock."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[dict[str, str]] | None = None

    def start(self, folder: Path, write: Callable[[], None], *states: dict[str, Any]) -> None:
        """Begin to `write` into `folder`, unless a tensor in `states` is not finite."""
        self._writing = self._thread.submit(lambda: write_checked(folder, write, states))

    def result(self) -> dict[str, str] | None:
        """The SHA-256 of every file in the folder, None while the write goes on. Raises what the write raised."""
        assert self._writing is not None
        return self._writing.result() if self._writing.done() else None


def write_checked(folder: Path, write: Callable[[], None], states: Iterable[dict[str, Any]]) -> dict[str, str]:
    """What the writer's thread does; the SHA-256 of every file in the folder, all of them on the disk.

    FloatingPointError where a weight or a moment is not finite: who went on from it would train nothing.
    """
    if not all(torch.isfinite(leaf).all() for leaf in tree_leaves(states) if isinstance(leaf, torch.Tensor)):
        raise FloatingPointError("the training has diverged: weights or moments are not finite, so nothing is saved")
    write()
    flush(folder)  # here, as the driver's node may not be the one whose memory holds it
    return digests_of(folder)


def apart(state: dict[str, Any], live: Iterable[Any]) -> dict[str, Any]:
    """`state` with nothing in it that shares memory with the tensors `live`, which the training goes on to change.

    Gathering copies what is sharded or on a GPU; on one CPU rank it hands out the live tensors themselves. What shares
    memory within `state`, as tied weights do, still does.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in map(_local, live) if tensor.device.type == "cpu"}
    leaves = (tensor for tensor in tree_leaves(state) if isinstance(tensor, torch.Tensor))
    fresh = {id(tensor): tensor for tensor in leaves if tensor.untyped_storage().data_ptr() not in held}
    return deepcopy(state, fresh)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
    return local.detach()
