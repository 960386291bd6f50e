"""Weights that stream from policy ranks to engines, bucket by bucket: whoever receives knows the table already.

`broadcast` is from the policy's rank 0 to the engines' processes, over a process group of their own: gloo between CPUs,
NCCL between GPUs. `ipc` is from each policy rank to the engine's process on the same GPU, through memory of that GPU.
Both meet at a TCPStore that rank 0 keeps.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed
from torch.multiprocessing import reductions

from slurmkit.generation.machine import use_interface_to
from slurmkit.generation.shared_tensors import Entry

BUCKET_BYTES = 256 << 20
"""A larger tensor has a bucket of its own."""


class Channel(Protocol):
    """One way of buckets, in the same order on both sides. Calls end with an error after the channel's timeout."""

    def send(self, bucket: torch.Tensor) -> None:
        """Bytes for all who receive; when it returns, `bucket` may be written again."""

    def receive(self, size: int) -> torch.Tensor:
        """The next bucket's bytes, in memory that nobody else writes."""


def connect(
    way: str, address: str, port: int, *, rank: int, size: int, device: torch.device, timeout_seconds: float
) -> Channel:
    """One end of a channel. Collective over all `size` of a broadcast, whose rank 0 sends."""
    timeout = timedelta(seconds=timeout_seconds)
    use_interface_to(address)
    store = distributed.TCPStore(address, port, None, False, timeout, False)  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return _Broadcast(store, rank, size, device, timeout) if way == "broadcast" else _Ipc(store, device)


def send(channel: Channel | None, table: Sequence[Entry], tensors: Iterable[tuple[str, Any]], device: Any) -> str:
    """Pack the tensors, which come in the table's order, and send them; their digest. Without a channel all are only
    taken, as a collective makes them."""
    found, stream = _Digest(), iter(tensors)
    if channel is None:
        for _ in stream:
            pass
        return ""
    for bucket in _buckets(table):
        start, end = _span(bucket)
        packed = torch.empty(end - start, dtype=torch.uint8, device=device)
        for entry in bucket:
            name, tensor = next(stream)
            if name != entry.name:
                raise RuntimeError(f"the policy's weights came as {name}, not as {entry.name}")
            _view(packed, entry, start).copy_(tensor)
            found.add(name, _view(packed, entry, start))
        channel.send(packed)
    return found.hex()


def receive(channel: Channel, table: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in the table's order, on the channel's device."""
    for bucket in _buckets(table):
        start, end = _span(bucket)
        packed = channel.receive(end - start)
        for entry in bucket:
            yield entry.name, _view(packed, entry, start)


def digested(tensors: Iterable[tuple[str, torch.Tensor]], into: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors; once all are taken, their digest is `into`'s only item."""
    found = _Digest()
    for name, tensor in tensors:
        found.add(name, tensor)
        yield name, tensor
    into.append(found.hex())


class _Digest:
    """SHA-256 of names and bytes, in the order in which they come."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._hash.update(name.encode())
        self._hash.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)

    def hex(self) -> str:
        return self._hash.hexdigest()


class _Broadcast:
    def __init__(self, store: Any, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
        self._device = device
        if device.type == "cuda":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = distributed.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def send(self, bucket: torch.Tensor) -> None:
        self._group.broadcast(bucket, 0).wait()

    def receive(self, size: int) -> torch.Tensor:
        packed = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._group.broadcast(packed, 0).wait()
        return packed


class _Ipc:
    """Sender and receiver find each other by the GPU's UUID, as each may call the GPU by another number."""

    def __init__(self, store: Any, device: torch.device) -> None:
        self._store = store
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        self._gpu = str(torch.cuda.get_device_properties(self._index).uuid)
        self._count = 0
        self._staging: torch.Tensor | None = None
        self._mapped: tuple[str, torch.Tensor] | None = None

    def send(self, bucket: torch.Tensor) -> None:
        if self._staging is None or len(self._staging) < len(bucket):
            self._staging = torch.empty(max(len(bucket), BUCKET_BYTES), dtype=torch.uint8, device=bucket.device)
            self._handle = _handle_of(self._staging)
        self._staging[: len(bucket)].copy_(bucket)
        torch.cuda.synchronize(self._index)
        key = self._key()
        self._store.set(key, self._handle)
        self._store.wait([f"{key}/taken"])
        self._store.delete_key(key)
        self._store.delete_key(f"{key}/taken")

    def receive(self, size: int) -> torch.Tensor:
        key = self._key()
        handle = self._store.get(key).decode()
        # Opened once: torch counts who has it open, and the sender's memory is free again when nobody has.
        if self._mapped is None or self._mapped[0] != handle:
            self._mapped = (handle, _opened(handle, self._index))
        packed = self._mapped[1][:size].clone()
        torch.cuda.synchronize(self._index)
        self._store.set(f"{key}/taken", b"1")
        return packed

    def _key(self) -> str:
        self._count += 1
        return f"{self._gpu}/{self._count}"


def _handle_of(staging: torch.Tensor) -> str:
    """What another process needs to open this memory, without the pickle that torch would make of it."""
    (_, size, _, _, _, _, _, *rest) = reductions.reduce_tensor(staging)[1]  # type: ignore[no-untyped-call]
    told = [base64.b64encode(part).decode() if isinstance(part, bytes) else part for part in rest]
    return json.dumps([size[0], *told])


def _opened(handle: str, device_index: int) -> torch.Tensor:
    size, storage, storage_size, storage_offset, _, counter, counter_offset, event, is_synced = json.loads(handle)
    opened: torch.Tensor = reductions.rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        torch.Tensor,
        torch.Size([size]),
        (1,),
        0,
        torch.storage.TypedStorage,
        torch.uint8,
        device_index,
        base64.b64decode(storage),
        storage_size,
        storage_offset,
        False,
        base64.b64decode(counter),
        counter_offset,
        base64.b64decode(event),
        is_synced,
    )
    return opened


def _buckets(table: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    bucket: list[Entry] = []
    for entry in table:
        if bucket and _span([*bucket[:1], entry])[1] - bucket[0].offset > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(entry)
    if bucket:
        yield bucket


def _span(bucket: Sequence[Entry]) -> tuple[int, int]:
    """First byte, and the one after the last."""
    last = bucket[-1]
    return bucket[0].offset, last.offset + last.num_bytes


def _view(packed: torch.Tensor, entry: Entry, start: int) -> torch.Tensor:
    part = packed[entry.offset - start :][: entry.num_bytes]
    return part.view(getattr(torch, entry.dtype)).view(entry.shape)
