"""`python -m slurmkit.bench.sync`: new weights from a policy rank to an engine on its node.

The rank's own `share_weights` and the engine's own `load`, in one process (vLLM's processes are beside it): what is
left out is Ray's call between them. Beside that, a copy of as many bytes from one tensor into another, both of which
are in memory. Rounds take turns; the first, which compares digests and touches the memory, is left out.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.utils.logging import disable_progress_bar

from slurmkit.bench import equal_work
from slurmkit.bench.child import answer
from slurmkit.bench.random_model import write_model
from slurmkit.bench.shapes import shape_of
from slurmkit.config.schema import TrainConfig
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.generation.vllm_engine import VllmEngine
from slurmkit.grpo.policy_worker import PolicyWorker

_MAX_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """What is moved, and to which engine."""

    shape: str
    side: str
    precision: str = "float32"
    rounds: int = 5
    threads: int = len(os.sched_getaffinity(0))
    seed: int = 0


def measure(settings: Settings) -> dict[str, Any]:
    """Medians over the rounds."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-") as folder:
        write_model(Path(folder), shape_of(settings.shape), _MAX_LENGTH, settings.seed)
        return {"settings": asdict(settings), "figures": asyncio.run(_rounds(folder, settings))}


async def _rounds(folder: str, settings: Settings) -> dict[str, Any]:
    worker = _worker(folder, settings)
    arguments: dict[str, Any] = {
        "precision": settings.precision,
        "max_total_length": _MAX_LENGTH,
        "max_batch_size": 8,
        "threads": settings.threads,
    }
    engine: Any = (
        TorchEngine(folder, **arguments)
        if settings.side == "torch"
        else VllmEngine(folder, temporary=folder, **arguments)
    )
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in _shared(worker))
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    share, load, copy = [], [], []
    for _ in range(settings.rounds + 1):
        began = time.perf_counter()
        weights = worker.share_weights()
        shared = time.perf_counter()
        loading = engine.load(weights)
        if inspect.isawaitable(loading):
            await loading
        loaded = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter()
        share.append(shared - began)
        load.append(loaded - shared)
        copy.append(copied - loaded)
    distributed.destroy_process_group()
    medians = {"share": share, "load": load, "copy": copy}
    figures = {f"{name}_seconds": statistics.median(seconds[1:]) for name, seconds in medians.items()}
    whole = figures["share_seconds"] + figures["load_seconds"]
    return {
        **figures,
        "bytes": size,
        "bytes_per_second": size / whole,
        "ratio_to_copy": equal_work.ratios([sum(pair) for pair in zip(share, load, strict=True)][1:], copy[1:]),
        "all_seconds": medians,
    }


def _shared(worker: PolicyWorker) -> list[tuple[str, torch.Tensor]]:
    weights = worker.share_weights()
    assert weights is not None  # this is rank 0
    return list(weights.opened().tensors.items())


def _worker(folder: str, settings: Settings) -> PolicyWorker:
    config = TrainConfig.model_validate(
        {
            "policy": {
                "model_name": folder,
                "max_total_sequence_length": _MAX_LENGTH,
                "precision": settings.precision,
            },
            "env": {"name": "arithmetic"},
            "cluster": {"gpus_per_node": 0},
        }
    )
    worker = PolicyWorker(config, rank=0, num_ranks=1, threads=settings.threads)
    worker.join("127.0.0.1", "127.0.0.1", worker.open_store("127.0.0.1"))
    worker.load(folder, None, None, 0)
    return worker


if __name__ == "__main__":
    answer(lambda settings: measure(Settings(**settings)))
