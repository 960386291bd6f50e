"""The trained model: one rank per device, sharded with FSDP2, and the driver's handle on all ranks.

Shapes: T positions of packed sequences, V vocabulary.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import ray
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import NodeFailure
from slurmkit.generation.actors import Actor, together
from slurmkit.generation.weights import Weights
from slurmkit.grpo.batch import MicroBatch, OptimizerStep
from slurmkit.grpo.loss import policy_loss
from slurmkit.grpo.loss_sums import LossSums
from slurmkit.grpo.policy_model import PolicyModel
from slurmkit.grpo.throughput import Description, shape_of
from slurmkit.grpo.writer import Writer, apart

# The whole state on the CPU of rank 0, under the names of the unsharded model: any other number of ranks can load it.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one rank saw of one optimiser step: its part of the sums, and the gradient's norm over all ranks.

    `peak_memory_gib` is the most that a rank has held up to now: what torch has reserved of a GPU, else of the process.
    """

    sums: LossSums
    grad_norm: float
    peak_memory_gib: float


class PolicyWorker:
    """One rank. Every method is collective: all ranks must call it, in the same order."""

    def __init__(self, config: TrainConfig, rank: int, num_ranks: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._config = config
        self._rank = rank
        self._num_ranks = num_ranks
        self._device = torch.device("cuda" if config.cluster.gpus_per_node else "cpu")
        self._timeout = timedelta(seconds=config.cluster.call_timeout_seconds)
        self._version = 0
        self._writer = Writer()

    def open_store(self, address: str) -> int:
        """On rank 0: listen at `address` for the other ranks; the port, which the system chooses."""
        self._store = self._connect(address, port=0)
        return int(self._store.port)

    def join(self, own_address: str, address: str, port: int) -> None:
        """Form the process group. `own_address` is this rank's node; `address` and `port` are rank 0's."""
        use_interface_of(own_address)
        if self._rank:
            self._store = self._connect(address, port)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=self._store, rank=self._rank, world_size=self._num_ranks, timeout=self._timeout
        )

    def _connect(self, address: str, port: int) -> Any:
        return distributed.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            self._num_ranks,
            is_master=self._rank == 0,
            timeout=self._timeout,
            wait_for_workers=False,
        )

    def load(self, model_path: str, optimizer_path: str | None, version: int) -> None:
        """Read the model from a folder that every rank sees, shard it, and take up the optimiser's state if any."""
        disable_progress_bar()
        self._version = version
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(self._device)
        self._policy = PolicyModel(self._model, logprob_chunk_size=self._config.policy.logprob_chunk_size)
        mesh = init_device_mesh(self._device.type, (self._num_ranks,))
        precision = MixedPrecisionPolicy(
            param_dtype=getattr(torch, self._config.policy.precision), reduce_dtype=torch.float32
        )
        for layer in self._model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(self._policy, mesh=mesh, mp_policy=precision)
        self._policy.train()
        settings = self._config.policy.optimizer.kwargs
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        if optimizer_path is not None:
            state = torch.load(optimizer_path, map_location="cpu", weights_only=True)
            set_optimizer_state_dict(self._model, self._optimizer, state, options=_WHOLE)

    def update(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """One optimiser step over this rank's micro-batches."""
        results = [self._forward_backward(micro_batch) for micro_batch in micro_batches]
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.policy.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, distributed.tensor.DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {float(norm)} at update {self._version + 1}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._version += 1
        return StepResult(reduce(add, results), float(norm), self._peak_memory_gib())

    def describe(self) -> Description:
        """The model's shape, and the name of the device."""
        on_gpu = self._device.type == "cuda"
        return Description(shape_of(self._model), torch.cuda.get_device_name(self._device) if on_gpu else "CPU")

    def _peak_memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _forward_backward(self, micro_batch: MicroBatch) -> LossSums:
        batch = micro_batch.to(self._device)
        temperature = self._config.policy.generation.temperature
        logprobs_T, entropy_T = self._policy(
            batch.token_ids_T, batch.position_ids_T, batch.lengths, temperature, batch.mask_T
        )
        loss, sums = policy_loss(logprobs_T, entropy_T, batch, self._config.loss_fn)
        # FSDP averages gradients over ranks; the loss is already a sum of the ranks' parts of one mean.
        torch.autograd.backward(loss * self._num_ranks)
        return sums

    def gather_weights(self) -> Weights | None:
        """The whole model on rank 0, None on the others."""
        state = get_model_state_dict(self._model, options=_WHOLE)
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        return Weights(self._version, tensors) if self._rank == 0 else None

    def put_weights(self) -> list[Any]:
        """Gather into Ray's object store, once for all engines. A list, as Ray would fetch a bare reference."""
        weights = self.gather_weights()
        return [] if weights is None else [ray.put(weights)]

    def save(self, folder: str) -> None:
        """Copy the whole state to rank 0's memory, whose thread then writes `model/` and `optimizer.pt`."""
        weights = get_model_state_dict(self._model, options=_WHOLE)
        optimizer = get_optimizer_state_dict(self._model, self._optimizer, options=_WHOLE)
        if self._rank == 0:
            live = tree_leaves([list(self._model.parameters()), self._optimizer.state_dict()["state"]])
            weights, optimizer = apart(weights, live), apart(optimizer, live)
            write = partial(self._write, Path(folder), weights, optimizer)
            self._writer.start(Path(folder), write, weights, optimizer)

    def _write(self, folder: Path, weights: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """In the writer's thread, while this rank goes on training: of the model it may take the configuration."""
        self._model.save_pretrained(folder / "model", state_dict=weights)
        torch.save(optimizer, folder / "optimizer.pt")

    def written(self) -> dict[str, str] | None:
        """On rank 0: what `Writer.result` says of the last `save`."""
        return self._writer.result()


def use_interface_of(address: str) -> None:
    """Make gloo and NCCL talk over the interface that owns `address`; before torch.distributed is imported or used.

    Left alone, gloo listens where the host's name resolves to, which on many nodes is 127.0.0.1: then ranks on other
    nodes are refused.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # SIOCGIFADDR (netdevice(7)): struct ifreq holds the name, then a sockaddr_in whose address is at 20.
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(found[20:24]) == address:
                os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
                return


class Policy:
    """All ranks, as the driver sees them."""

    def __init__(self, ranks: Sequence[Actor], addresses: Sequence[str]) -> None:
        """`ranks` in order; `addresses` of their nodes."""
        self._ranks = ranks
        self._addresses = addresses

    async def start(self, model_path: Path, optimizer_path: Path | None, version: int) -> None:
        """Form the process group and load the model on every rank."""
        address = self._addresses[0]
        port = await self._ranks[0].call("open_store", address)
        await together(
            *(rank.call("join", own, address, port) for rank, own in zip(self._ranks, self._addresses, strict=True))
        )
        await self._all("load", str(model_path), str(optimizer_path) if optimizer_path else None, version)

    async def update(self, step: OptimizerStep) -> StepResult:
        """One optimiser step on all ranks; the sums over all of them."""
        results = await together(
            *(rank.call("update", micro_batches) for rank, micro_batches in zip(self._ranks, step.ranks, strict=True))
        )
        peak = max(result.peak_memory_gib for result in results)
        return StepResult(reduce(add, (result.sums for result in results)), results[0].grad_norm, peak)

    async def describe(self) -> Description:
        """The model's shape, and the name of rank 0's device."""
        description: Description = await self._ranks[0].call("describe")
        return description

    async def put_weights(self) -> Any:
        """A Ray reference to the whole model's `Weights`, for engines to fetch; the driver never holds them."""
        references = await together(*(rank.call("put_weights") for rank in self._ranks))
        return references[0][0]

    async def save(self, folder: Path) -> None:
        """Copy model and optimiser state, and begin to write them under `folder`, which rank 0's node must see."""
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

    async def _all(self, method: str, *arguments: Any) -> None:
        await together(*(rank.call(method, *arguments) for rank in self._ranks))
