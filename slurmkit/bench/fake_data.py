"""`python -m slurmkit.bench.fake_data`: the trainer alone, on random tokens and random weights of a real shape.

prime-rl's protocol (benchmarks/ of its repository): each micro-batch is one sequence of the full length, some steps of
so many micro-batches, the first step left out. What is timed is the policy rank's own `update`, from micro-batches on
the CPU to stepped weights, in this process: no Ray, no engine, one device.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import distributed
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from slurmkit.bench.child import answer
from slurmkit.bench.machine import peak_resident_mib, reset_peak_resident, resident_mib
from slurmkit.bench.shapes import Shape, shape_of
from slurmkit.config.algorithm import LossFn
from slurmkit.config.schema import TrainConfig
from slurmkit.grpo.batch import MicroBatch, optimizer_steps
from slurmkit.grpo.policy_worker import PolicyWorker
from slurmkit.grpo.throughput import peak_flops
from slurmkit.rollout.sample import Sample


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. `seq_length` tokens in each micro-batch, in `sequences` of equal length."""

    shape: str
    vocab_size: int | None
    seq_length: int
    sequences: int
    micro_batches: int
    steps: int
    precision: str
    device: str
    threads: int
    seed: int


def settled(given: Mapping[str, Any]) -> Settings:
    """With defaults for what was left out, by the device: the GPU where there is one."""
    on_gpu = given.get("device", "cuda" if torch.cuda.is_available() else "cpu") == "cuda"
    defaults = {
        "shape": "qwen3-0.6b" if on_gpu else "small",
        "vocab_size": None,
        "seq_length": 16384 if on_gpu else 1024,
        "sequences": 1,
        "micro_batches": 2,
        "steps": 4,
        "precision": "bfloat16" if on_gpu else "float32",
        "device": "cuda" if on_gpu else "cpu",
        "threads": len(os.sched_getaffinity(0)),
        "seed": 0,
    }
    return Settings(**{**defaults, **given})


def measure(settings: Settings) -> dict[str, Any]:
    """Figures of all steps but the first; MiB are GPU memory that torch has reserved, or resident memory on a CPU."""
    torch.set_num_threads(settings.threads)
    shape = shape_of(settings.shape, settings.vocab_size)
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-") as folder:
        _write_model(Path(folder), shape, settings)
        worker = _worker(Path(folder), settings)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = _peak_memory(settings.device)
    else:
        reset_peak_resident()
        loaded = resident_mib()
    seconds = []
    for step in range(settings.steps):
        micro_batches = _micro_batches(shape, settings, step)
        began = time.perf_counter()
        worker.update(micro_batches, step + 1)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak_memory = _peak_memory(settings.device)
    length = settings.seq_length // settings.sequences
    flops_per_token = worker.describe().shape.flops([length]) / length
    distributed.destroy_process_group()
    tokens = settings.seq_length * settings.micro_batches
    tokens_per_second = tokens * (settings.steps - 1) / sum(seconds[1:])
    device = torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"
    peak = peak_flops(device) or _matmul_flops(settings)
    figures = {
        "tokens_per_second": tokens_per_second,
        "step_seconds": sum(seconds[1:]) / (settings.steps - 1),
        "micro_batch_seconds": sum(seconds[1:]) / (settings.steps - 1) / settings.micro_batches,
        "mfu": tokens_per_second * flops_per_token / peak,
        "peak_memory_mib": peak_memory,
        "loaded_memory_mib": loaded,
        "peak_flops": peak,
        "peak_flops_from": "the data sheet" if peak_flops(device) else f"matmuls in {settings.precision}, measured",
        "flops_per_token": flops_per_token,
        "device_name": device,
        "all_step_seconds": seconds,
    }
    return {"settings": asdict(settings), "figures": figures}


def _write_model(folder: Path, shape: Shape, settings: Settings) -> None:
    """A folder that the rank reads like any other: what is measured includes nothing of how it came to be."""
    disable_progress_bar()
    torch.manual_seed(settings.seed)
    config = Qwen3Config(**asdict(shape), max_position_embeddings=settings.seq_length, bos_token_id=None)
    with torch.device(settings.device):
        model: Any = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _worker(folder: Path, settings: Settings) -> PolicyWorker:
    config = TrainConfig.model_validate(
        {
            "grpo": {"num_prompts_per_step": 1, "num_generations_per_prompt": _samples(settings) * 2},
            "policy": {
                "model_name": str(folder),
                "train_global_batch_size": _samples(settings),
                "max_total_sequence_length": settings.seq_length,
                "sequence_packing": {"train_mb_tokens": settings.seq_length},
                "precision": settings.precision,
            },
            "env": {"name": "arithmetic"},
            "cluster": {"gpus_per_node": 1 if settings.device == "cuda" else 0},
        }
    )
    worker = PolicyWorker(config, rank=0, num_ranks=1, threads=settings.threads)
    worker.join("127.0.0.1", "127.0.0.1", worker.open_store("127.0.0.1"))
    worker.load(str(folder), None, None, 0)
    return worker


def _samples(settings: Settings) -> int:
    return settings.sequences * settings.micro_batches


def _micro_batches(shape: Shape, settings: Settings, step: int) -> tuple[MicroBatch, ...]:
    """Through the trainer's own packing."""
    rng = numpy.random.default_rng([settings.seed, step])
    length = settings.seq_length // settings.sequences
    samples = [
        Sample(
            token_ids=rng.integers(shape.vocab_size, size=length, dtype=numpy.int32),
            loss_mask=numpy.arange(length) > 0,
            # About what random weights say of every token, so that ratios are near 1.
            logprobs=numpy.full(length, -numpy.log(shape.vocab_size), numpy.float32),
            advantage=rng.standard_normal(length, numpy.float32),
            group_id=0,
            rollout_id=index,
            temperature=1.0,
            weight_version=step,
            finish_reason="length",
        )
        for index in range(_samples(settings))
    ]
    (made,) = optimizer_steps(
        samples,
        global_batch_size=len(samples),
        micro_batch_tokens=settings.seq_length,
        num_ranks=1,
        loss_fn=LossFn(),
    )
    return made.ranks[0]


def _peak_memory(device: str) -> float:
    return torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else peak_resident_mib()


def _matmul_flops(settings: Settings, size: int = 1536, rounds: int = 8) -> float:
    """FLOP/s of the best of some square matmuls, with the threads that training had."""
    left, right = torch.randn(2, size, size, dtype=getattr(torch, settings.precision), device=settings.device)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


if __name__ == "__main__":
    answer(lambda given: measure(settled(given)))
