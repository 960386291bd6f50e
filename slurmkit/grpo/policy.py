"""The trained model as the driver sees it: all of its ranks behind one object."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from slurmkit.errors import NodeFailure
from slurmkit.generation.actors import Actor, together
from slurmkit.grpo.batch import OptimizerStep, pack, share_out
from slurmkit.grpo.policy_worker import Scorer, StepResult
from slurmkit.grpo.throughput import Description
from slurmkit.rollout.sample import Sample


class Policy:
    """All ranks, as the driver sees them."""

    def __init__(
        self,
        ranks: Sequence[Actor],
        addresses: Sequence[str],
        *,
        tensor_parallel_size: int,
        micro_batch_tokens: int,
    ) -> None:
        """`ranks` in order; `addresses` of their nodes."""
        self._ranks = ranks
        self._addresses = addresses
        self._tensor_parallel_size = tensor_parallel_size
        self._micro_batch_tokens = micro_batch_tokens

    async def start(self, model_path: Path, starting_path: Path | None, checkpoint: Path | None, version: int) -> None:
        """Form the process group and load the model on every rank; see `PolicyWorker.load`."""
        address = self._addresses[0]
        port = await self._ranks[0].call("open_store", address)
        await together(
            *(rank.call("join", own, address, port) for rank, own in zip(self._ranks, self._addresses, strict=True))
        )
        paths = (str(path) if path else None for path in (model_path, starting_path, checkpoint))
        await self._all("load", *paths, version)

    async def update(self, step: OptimizerStep, training_step: int) -> StepResult:
        """One optimiser step on all ranks; the sums over all of them. Failure where the gradient is not finite."""
        results = await self._shared("update", step.ranks, training_step)
        sums = reduce(add, (result.sums for result in results))
        return StepResult(
            sums,
            results[0].grad_norm,
            results[0].lr,
            {name: max(result.seconds[name] for result in results) for name in results[0].seconds},
            max(result.peak_memory_gib for result in results),
        )

    async def logprobs(self, samples: Sequence[Sample], of: Scorer) -> list[NDArray[numpy.float32]]:
        """Natural logarithms of the probabilities of each sample's trained tokens, 0 for its others.

        `of` the policy as it is now, or of the reference model, which the configuration must ask for.
        """
        size = self._tensor_parallel_size
        shares = share_out(
            [len(sample.token_ids) for sample in samples], self._micro_batch_tokens, len(self._ranks) // size
        )
        batches = [[pack([(samples[index], 0.0) for index in indices]) for indices in share] for share in shares]
        scored: dict[int, NDArray[numpy.float32]] = {}
        for share, found in zip(shares, await self._shared("logprobs", batches, of), strict=True):
            for indices, logprobs_T in zip(share, found, strict=True):
                ends = numpy.cumsum([len(samples[index].token_ids) for index in indices])[:-1]
                scored |= zip(indices, numpy.split(logprobs_T, ends), strict=False)
        return [scored[index] for index in range(len(samples))]

    async def describe(self) -> Description:
        """The model's shape, and the name of rank 0's device."""
        description: Description = await self._ranks[0].call("describe")
        return description

    async def rest(self) -> None:
        """Give the GPUs' memory to others until `wake`; see `PolicyWorker.rest`."""
        await self._all("rest")

    async def wake(self) -> None:
        """Have it again."""
        await self._all("wake")

    async def save(self, folder: Path) -> None:
        """Copy model, adapters and optimiser, and begin to write them under `folder`, which rank 0's node must see."""
        await self._all("save", str(folder))

    async def written(self) -> dict[str, str]:
        """Wait until that is written; the SHA-256 of every file in the folder. Failure where it could not be."""
        rank, pause = self._ranks[0], 0.02
        try:
            async with asyncio.timeout(rank.timeout_seconds):
                while True:
                    # Asked again and again, as rank 0 has an update to make meanwhile and does one thing at a time.
                    digests: dict[str, str] | None = await rank.call("written")
                    if digests is not None:
                        return digests
                    await asyncio.sleep(pause)
                    pause = min(1.0, 1.5 * pause)
        except TimeoutError:
            raise NodeFailure(
                f"{rank.name} did not write the checkpoint within {rank.timeout_seconds:g} s "
                "(cluster.call_timeout_seconds)"
            ) from None

    async def _shared(self, method: str, shares: Sequence[Any], *arguments: Any) -> list[Any]:
        """Give each data-parallel rank its share; the values of one of the tensor-parallel ranks of each."""
        size = self._tensor_parallel_size
        values = await together(
            *(rank.call(method, shares[number // size], *arguments) for number, rank in enumerate(self._ranks))
        )
        return values[::size]

    async def _all(self, method: str, *arguments: Any) -> None:
        await together(*(rank.call(method, *arguments) for rank in self._ranks))
