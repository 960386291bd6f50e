"""What slurmkit adds to vLLM's worker processes: loading weights in place, and ending with the engine.

vLLM imports this module in each worker, by the name that `VllmEngine` gives it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Sequence
from typing import Any

from safetensors.torch import load_file

from slurmkit.generation.channels import Channel, connect, digested, receive
from slurmkit.generation.shared_tensors import Entry, read
from slurmkit.generation.weights import digest

ENGINE_PROCESS = "SK_ENGINE_PROCESS"


class WorkerExtension:
    """Mixed into vLLM's Worker, whose attributes these methods use."""

    reload_weights: Any
    rank: int
    device: Any
    _slurmkit_channel: Channel

    def slurmkit_connect(
        self, way: str, address: str, port: int, first_rank: int, size: int, timeout_seconds: float
    ) -> None:
        """Join a channel, as the rank that the place in the engine gives."""
        self._slurmkit_channel = connect(
            way,
            address,
            port,
            rank=first_rank + self.rank,
            size=size,
            device=self.device,
            timeout_seconds=timeout_seconds,
        )

    def slurmkit_load(self, way: str, path: str, table: Sequence[Sequence[Any]], wants_digest: bool) -> str | None:
        """Take over tensors, whole in each process, which keeps its part: `shared` or `saved` at `path`, or `streamed`
        over the channel. The digest of what came, where it is wanted.

        Tied weights are to be given under both names: on a CPU vLLM keeps the head a second time, in the layout of its
        kernel, and leaves that as it was where only the embeddings are given.
        """
        entries = [Entry(*entry) for entry in table]
        if way == "streamed":
            digests = list[str]()
            stream = receive(self._slurmkit_channel, entries)
            if wants_digest:
                stream = digested(stream, digests)
            self.reload_weights(weights_iterator=stream)
            for _ in stream:  # what the model has no use for: whoever sends waits until it is taken
                pass
            return digests[0] if digests else None
        tensors = dict(read(path, entries)) if way == "shared" else load_file(path)
        self.reload_weights(weights_iterator=iter(tensors.items()))
        return digest(tensors) if wants_digest else None


def _end_with(engine: int) -> None:
    """vLLM's processes notice the end of a parent that says so; of one that was killed they do not."""
    parent = os.getppid()  # vLLM's scheduler, unless that runs in this process
    try:
        handle = os.pidfd_open(engine)
    except ProcessLookupError:
        pass
    else:
        select.select([handle], [], [])
    if parent != engine:
        os.kill(parent, signal.SIGKILL)
    os._exit(1)


if os.environ.get(ENGINE_PROCESS):
    threading.Thread(target=_end_with, args=(int(os.environ[ENGINE_PROCESS]),), daemon=True).start()
