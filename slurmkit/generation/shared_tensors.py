"""Tensors that one process lays into memory for others of its machine.

The memory has no name in /dev/shm: it is gone with the last process that has it, however that ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

_ALIGNMENT = 64


class Entry(NamedTuple):
    """Where a tensor lies. Example: Entry("model.norm.weight", "float32", (128,), 4096)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start."""

    @property
    def num_bytes(self) -> int:
        """That the tensor itself takes."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return torch.Size(self.shape).numel() * itemsize


def lay_out(tensors: Mapping[str, torch.Tensor], precision: torch.dtype | None = None) -> list[Entry]:
    """A place for each tensor, one after the other: real numbers in `precision`, where it is given."""
    table, offset = list[Entry](), 0
    for name, tensor in tensors.items():
        dtype = precision if precision is not None and tensor.is_floating_point() else tensor.dtype
        table.append(Entry(name, str(dtype).removeprefix("torch."), tuple(tensor.shape), offset))
        offset += -(-table[-1].num_bytes // _ALIGNMENT) * _ALIGNMENT
    return table


class SharedTensors:
    """The side that writes. Later tensors take the place of earlier ones, in the same memory where that is enough."""

    def __init__(self) -> None:
        self._file = os.memfd_create("slurmkit-weights")
        self._memory: mmap.mmap | None = None

    @property
    def path(self) -> str:
        """What another process of this user, on this machine, opens while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def write(self, tensors: Mapping[str, torch.Tensor]) -> list[Entry]:
        """Copy the tensors, and tell where each lies."""
        self.fill(table := lay_out(tensors), tensors.items())
        return table

    def fill(self, table: Sequence[Entry], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the tensors to where the table says, one by one as they come, as numbers of the type that it says."""
        size = table[-1].offset + table[-1].num_bytes
        if self._memory is None or len(self._memory) < size:
            os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, size)
        places = {entry.name: entry for entry in table}
        for name, tensor in tensors:
            _view(self._memory, places[name]).copy_(tensor)


def read(path: str, table: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, which lie in the shared memory itself: they are what the other side writes next."""
    status = os.stat(path)
    memory = _mapped(path, status.st_dev, status.st_ino, status.st_size)
    for entry in table:
        yield entry.name, _view(memory, entry)


@lru_cache(maxsize=1)
def _mapped(path: str, device: int, inode: int, size: int) -> mmap.mmap:
    """The memory of this path as it is now. Kept: to map it anew, page by page, takes half as long as its copy."""
    file = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def _view(memory: mmap.mmap, entry: Entry) -> torch.Tensor:
    count = torch.Size(entry.shape).numel()
    dtype = getattr(torch, entry.dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.offset).view(entry.shape)
