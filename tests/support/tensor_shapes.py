"""What tensors a piece of code makes, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """`largest` is the number of entries of the largest tensor that any operation has made; a view makes none."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        there = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        made = [leaf for leaf in _tensors(result) if leaf.untyped_storage().data_ptr() not in there]
        self.largest = max(self.largest, *(leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in made), 0)
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
