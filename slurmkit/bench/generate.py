"""`python -m slurmkit.bench.generate`: sampling with one of our engines, or with transformers' own `generate`.

The same random weights, prompts, lengths and threads for each, in a process of its own. The workload is `even`, a batch
of different prompts that are all completed to the same length; or `rollouts`, what a training step asks for: two
batches, in groups of eight with one prompt, as long as it comes, from one token to twice the mean. transformers samples
a batch until its longest completion is done. Lengths are given, as random weights know no end; an end token that is
sampled all the same is counted as it comes. The first round is left out.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
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
_GROUP = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """What is sampled, in each of `rounds` beside a first: at most `batch` completions at once, of `new_tokens` in the
    mean, after prompts of equal length."""

    shape: str
    side: str
    workload: str = "even"
    batch: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 1
    precision: str = "float32"
    device: str = "cpu"
    threads: int = len(os.sched_getaffinity(0))
    seed: int = 0

    @property
    def max_new_tokens(self) -> int:
        return self.new_tokens if self.workload == "even" else 2 * self.new_tokens - 1


def measure(settings: Settings) -> dict[str, Any]:
    """Start one side and sample with it."""
    torch.set_num_threads(settings.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-") as folder:
        parameters = write_model(
            Path(folder), shape_of(settings.shape), settings.prompt_tokens + settings.max_new_tokens, settings.seed
        )
        return {"settings": asdict(settings), "figures": asyncio.run(_rounds(Path(folder), settings, parameters))}


async def _rounds(folder: Path, settings: Settings, parameters: int) -> dict[str, Any]:
    began = time.perf_counter()
    sample = {"transformers": _transformers, "torch": _torch, "vllm": _vllm}[settings.side](folder, settings)
    start = time.perf_counter() - began
    tokens, rates = [], []
    for number in range(settings.rounds + 1):
        began = time.perf_counter()
        tokens.append(await sample(number))
        rates.append(tokens[-1] / (time.perf_counter() - began))
    return {
        "tokens_per_second": statistics.median(rates[1:]),
        "tokens_per_round": statistics.fmean(tokens[1:]),
        "all_tokens_per_second": rates,
        "start_seconds": start,
        "parameters": parameters,
    }


def _asked(settings: Settings, number: int) -> list[tuple[tuple[int, ...], int]]:
    """A round's prompts and lengths. No two rounds have a prompt in common, which would be in a cache."""
    rng = numpy.random.default_rng([settings.seed, number])
    even = settings.workload == "even"
    count, group = (settings.batch, 1) if even else (2 * settings.batch, min(_GROUP, settings.batch))
    prompts = [tuple(rng.integers(256, size=settings.prompt_tokens).tolist()) for _ in range(-(-count // group))]
    lengths = [settings.new_tokens] * count if even else rng.integers(1, settings.max_new_tokens + 1, count).tolist()
    return [(prompts[index // group], length) for index, length in enumerate(lengths)]


def _requests(settings: Settings, number: int) -> dict[int, Request]:
    asked = _asked(settings, number)
    first = number * len(asked)
    return {
        first + index: Request(prompt, SamplingParams(1.0, length, seed=first + index))
        for index, (prompt, length) in enumerate(asked)
    }


def _engine_arguments(settings: Settings) -> dict[str, Any]:
    return {
        "precision": settings.precision,
        "max_total_length": settings.prompt_tokens + settings.max_new_tokens,
        "max_batch_size": settings.batch,
        "threads": settings.threads,
        "device": settings.device,
    }


def _transformers(folder: Path, settings: Settings) -> _Round:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.precision))
    model = model.to(settings.device).eval()

    async def sample(number: int) -> int:
        torch.manual_seed(number)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        asked, tokens = _asked(settings, number), 0
        for first in range(0, len(asked), settings.batch):
            prompts, lengths = zip(*asked[first : first + settings.batch], strict=True)
            prompts_BP = torch.tensor(prompts, device=settings.device)
            with torch.inference_mode():
                found_BT = model.generate(
                    prompts_BP, attention_mask=torch.ones_like(prompts_BP), max_new_tokens=max(lengths), **options
                )[:, settings.prompt_tokens :]
            is_wanted_BT = torch.arange(found_BT.shape[1]) < torch.tensor(lengths)[:, None]
            tokens += int((is_wanted_BT & (found_BT.cpu() != model.config.pad_token_id)).sum())
        return tokens

    return sample


def _torch(folder: Path, settings: Settings) -> _Round:
    return _engine(TorchEngine(str(folder), **_engine_arguments(settings)), settings)


def _vllm(folder: Path, settings: Settings) -> _Round:
    return _engine(VllmEngine(str(folder), temporary=str(folder), **_engine_arguments(settings)), settings)


def _engine(engine: Any, settings: Settings) -> _Round:
    async def sample(number: int) -> int:
        waiting, tokens = _requests(settings, number), 0
        await _answer(engine.submit(waiting))
        while waiting:
            for ticket, completion in (await _answer(engine.collect())).items():
                del waiting[ticket]
                tokens += len(completion.token_ids)
        return tokens

    return sample


async def _answer(given: Any) -> Any:
    """Only vLLM's engine has to be waited for."""
    return await given if inspect.isawaitable(given) else given


if __name__ == "__main__":
    answer(lambda settings: measure(Settings(**settings)))
