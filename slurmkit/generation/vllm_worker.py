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

from slurmkit.generation.shared_tensors import Entry, read
from slurmkit.generation.weights import digest

ENGINE_PROCESS = "SK_ENGINE_PROCESS"


class WorkerExtension:
    """Mixed into vLLM's Worker, whose attributes these methods use."""

    reload_weights: Any

    def slurmkit_load(self, path: str, table: Sequence[Sequence[Any]], wants_digest: bool) -> str | None:
        """Take over the tensors that lie at `path`. The digest of what was read, where it is wanted.

        Tied weights are to be given under both names: on a CPU vLLM keeps the head a second time, in the layout of its
        kernel, and leaves that as it was where only the embeddings are given.
        """
        tensors = dict(read(path, [Entry(*entry) for entry in table]))
        self.reload_weights(weights_iterator=iter(tensors.items()))
        return digest(tensors) if wants_digest else None


def _end_with(engine: int) -> None:
    """vLLM's processes notice the end of a parent that says so; of one that was killed they do not."""
    try:
        handle = os.pidfd_open(engine)
    except ProcessLookupError:
        pass
    else:
        select.select([handle], [], [])
    os.kill(os.getppid(), signal.SIGKILL)
    os._exit(1)


if os.environ.get(ENGINE_PROCESS):
    threading.Thread(target=_end_with, args=(int(os.environ[ENGINE_PROCESS]),), daemon=True).start()
