"""`python -m slurmkit.bench.generate`: sampling with one of our engines, or with transformers' own `generate`.

The same random weights, prompts, lengths and threads for each, in a process of its own. Nothing ends early: with random
weights the end token is as unlikely as any other, and tokens are counted as they come. The first round is left out.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from slurmkit.bench.child import answer
from slurmkit.bench.random_model import write_model
from slurmkit.bench.shapes import shape_of
from slurmkit.generation.engine import Request, SamplingParams
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.generation.vllm_engine import VllmEngine

# A round samples with the given seeds; the number of tokens that it made.
_Round = Callable[[int], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is sampled, in each of `rounds` beside a first: `batch` completions of `new_tokens` after equal prompts."""

    shape: str
    side: str
    batch: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 64
    rounds: int = 3
    precision: str = "float32"
    device: str = "cpu"
    threads: int = len(os.sched_getaffinity(0))
    seed: int = 0


def measure(settings: Settings) -> dict[str, Any]:
    """Start one side and sample with it."""
    torch.set_num_threads(settings.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-") as folder:
        parameters = write_model(
            Path(folder), shape_of(settings.shape), settings.prompt_tokens + settings.new_tokens, settings.seed
        )
        return {"settings": asdict(settings), "figures": asyncio.run(_rounds(Path(folder), settings, parameters))}


async def _rounds(folder: Path, settings: Settings, parameters: int) -> dict[str, Any]:
    began = time.perf_counter()
    sample = {"transformers": _transformers, "torch": _torch, "vllm": _vllm}[settings.side](folder, settings)
    start = time.perf_counter() - began
    rates = []
    for number in range(settings.rounds + 1):
        began = time.perf_counter()
        tokens = await sample(number)
        rates.append(tokens / (time.perf_counter() - began))
    return {
        "tokens_per_second": statistics.median(rates[1:]),
        "all_tokens_per_second": rates,
        "start_seconds": start,
        "parameters": parameters,
    }


def _prompts(settings: Settings) -> list[tuple[int, ...]]:
    rng = numpy.random.default_rng(settings.seed)
    return [tuple(rng.integers(256, size=settings.prompt_tokens).tolist()) for _ in range(settings.batch)]


def _requests(prompts: Sequence[tuple[int, ...]], settings: Settings, number: int) -> dict[int, Request]:
    first = number * settings.batch
    return {
        first + index: Request(prompt, SamplingParams(1.0, settings.new_tokens, seed=first + index))
        for index, prompt in enumerate(prompts)
    }


def _engine_arguments(settings: Settings) -> dict[str, Any]:
    return {
        "precision": settings.precision,
        "max_total_length": settings.prompt_tokens + settings.new_tokens,
        "max_batch_size": settings.batch,
        "threads": settings.threads,
        "device": settings.device,
    }


def _transformers(folder: Path, settings: Settings) -> _Round:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.precision))
    model = model.to(settings.device).eval()
    prompts = torch.tensor(_prompts(settings), device=settings.device)

    async def sample(number: int) -> int:
        torch.manual_seed(number)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            found = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=settings.new_tokens, **options
            )
        return int((found[:, settings.prompt_tokens :] != model.config.pad_token_id).sum())

    return sample


def _torch(folder: Path, settings: Settings) -> _Round:
    engine, prompts = TorchEngine(str(folder), **_engine_arguments(settings)), _prompts(settings)

    async def sample(number: int) -> int:
        engine.submit(_requests(prompts, settings, number))
        return sum(len(completion.token_ids) for completion in engine.collect().values())

    return sample


def _vllm(folder: Path, settings: Settings) -> _Round:
    engine = VllmEngine(str(folder), temporary=str(folder), **_engine_arguments(settings))
    prompts = _prompts(settings)

    async def sample(number: int) -> int:
        await engine.submit(_requests(prompts, settings, number))
        lengths: list[int] = []
        while len(lengths) < settings.batch:
            lengths += [len(completion.token_ids) for completion in (await engine.collect()).values()]
        return sum(lengths)

    return sample


if __name__ == "__main__":
    answer(lambda settings: measure(Settings(**settings)))
