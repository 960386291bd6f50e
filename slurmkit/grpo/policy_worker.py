"""One rank of the trained model: what it loads, how it is updated, what it computes and saves.

Shapes: T positions of packed sequences.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from slurmkit.config.schema import TrainConfig
from slurmkit.generation.channels import Channel, connect, send
from slurmkit.generation.machine import use_gpus, use_interface_of
from slurmkit.generation.shared_tensors import Entry, SharedTensors, lay_out
from slurmkit.generation.weights import SavedWeights, SharedWeights, StreamedWeights, Way, Weights, digest
from slurmkit.grpo.batch import MicroBatch
from slurmkit.grpo.causal_lm import add_adapters, blank_model, whole_model
from slurmkit.grpo.loss import policy_loss
from slurmkit.grpo.loss_sums import LossSums
from slurmkit.grpo.optimizer import LearningRate, clip_gradients, make_optimizer
from slurmkit.grpo.policy_model import PolicyModel
from slurmkit.grpo.sharding import make_meshes, shard, sum_over_tensor_ranks
from slurmkit.grpo.stopwatch import Stopwatch
from slurmkit.grpo.throughput import Description, shape_of
from slurmkit.grpo.writer import Writer, apart

# The whole state on the CPU of rank 0, under the names of the unsharded model: any other number of ranks can load it.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

Scorer = Literal["policy", "reference"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a rank saw of one optimiser step: its part of the sums, and the gradient's norm over all ranks.

    `seconds` are those of forward, backward and optimizer; `peak_memory_gib` is the most that the rank has had so far,
    of the GPU's memory where there is one.
    """

    sums: LossSums
    grad_norm: float
    lr: float
    seconds: dict[str, float]
    peak_memory_gib: float


class PolicyWorker:
    """One rank. Every method is collective: all ranks must call it, in the same order."""

    def __init__(self, config: TrainConfig, rank: int, num_ranks: int, threads: int, gpu: str | None = None) -> None:
        """`gpu` is the one to use, as CUDA_VISIBLE_DEVICES names it; None leaves that as it is."""
        use_gpus([gpu] if gpu is not None else [])
        torch.set_num_threads(threads)
        self._config = config
        self._rank = rank
        self._num_ranks = num_ranks
        # torch.cuda.set_device refuses a device without an index. The process sees one GPU.
        self._device = torch.device("cuda", 0) if config.cluster.gpus_per_node else torch.device("cpu")
        self._timeout = timedelta(seconds=config.cluster.call_timeout_seconds)
        self._version = 0
        self._writer = Writer()
        self._shared = SharedTensors()
        self._has_told_digest = False
        self._channels: dict[Way, Channel | None] = {}
        self._precision: torch.dtype = getattr(torch, config.policy.precision)

    def open_store(self, address: str) -> int:
        """On rank 0: listen at `address` for the other ranks; the port, which the system chooses."""
        self._store = self._connect(address, port=0)
        return int(self._store.port)

    def join(self, own_address: str, address: str, port: int) -> None:
        """Form the process group. `own_address` is this rank's node; `address` and `port` are rank 0's."""
        use_interface_of(own_address)
        if self._rank:
            self._store = self._connect(address, port)
        # gloo beside NCCL for what is kept in the CPU's memory.
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
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

    def load(self, model_path: str, starting_path: str | None, checkpoint: str | None, version: int) -> None:
        """Read the model, shard it, and take up adapters and the optimiser's state from a checkpoint, if any.

        `model_path` is the model as it is now, `starting_path` as it was before training, where that is asked for: the
        reference, and what adapters are beside. All are folders that every rank sees; weights are read by rank 0.
        """
        policy = self._config.policy
        settings = policy.dtensor_cfg
        self._version = version
        self._meshes = make_meshes(
            self._device.type, self._num_ranks, self._config.num_policy_nodes, policy.dtensor_cfg
        )
        base = model_path
        self._adapters = None
        if settings.lora_cfg.enabled:
            assert starting_path is not None
            base = starting_path
        self._causal_lm = self._open(base)
        if self._rank == 0:
            with torch.device("meta"):
                self._skeleton = blank_model(base, trust_remote_code=policy.trusts_remote_code)
            self._skeleton.generation_config = self._causal_lm.generation_config
        if settings.lora_cfg.enabled:
            self._adapters = add_adapters(self._causal_lm, settings.lora_cfg, self._config.grpo.seed)
            if checkpoint is not None and self._rank == 0:
                self._adapters.take_up(Path(checkpoint) / "adapter")
        self._model, self._partly = self._shard(self._causal_lm)
        self._reference = None
        if self._config.loss_fn.needs_reference_logprobs and self._adapters is None:
            assert starting_path is not None
            self._reference, _ = self._shard(self._open(starting_path).requires_grad_(False))
        self._optimizer = make_optimizer(self._model.parameters(), policy.optimizer)
        self._rate = LearningRate(policy.optimizer.kwargs.lr, policy.scheduler)
        if checkpoint is not None:
            # Mapped, not read: each rank takes its part of it.
            path = Path(checkpoint) / "optimizer.pt"
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if state:
                set_optimizer_state_dict(self._causal_lm, self._optimizer, state, options=_WHOLE)

    def _open(self, path: str) -> Any:
        return (blank_model if self._rank else whole_model)(
            path, trust_remote_code=self._config.policy.trusts_remote_code
        )

    def _shard(self, causal_lm: Any) -> tuple[PolicyModel, list[torch.nn.Module]]:
        policy = self._config.policy
        # Tried out where the weights are.
        packs: list[bool | None] = [None]
        if self._rank == 0:
            model = PolicyModel(causal_lm, logprob_chunk_size=policy.logprob_chunk_size)
            packs = [model.packs]
        distributed.broadcast_object_list(packs, src=0)
        if self._rank:
            model = PolicyModel(causal_lm, logprob_chunk_size=policy.logprob_chunk_size, packs=packs[0])
        return model, shard(model, causal_lm, self._meshes, policy.dtensor_cfg, precision=policy.precision)

    def update(self, micro_batches: Sequence[MicroBatch], training_step: int) -> StepResult:
        """One optimiser step over this rank's micro-batches. Tensor-parallel ranks are given the same ones."""
        watch = Stopwatch(self._device)
        lr = self._rate.at(training_step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._adapters is not None:
            self._adapters.set_dropout(on=True)
            torch.manual_seed(self._config.grpo.seed + self._version * self._num_ranks + self._rank)
        sums = reduce(add, [self._forward_backward(micro_batch, watch) for micro_batch in micro_batches])
        if self._adapters is not None:
            self._adapters.set_dropout(on=False)
        sum_over_tensor_ranks(self._partly, self._meshes)
        norm = clip_gradients(list(self._model.parameters()), self._config.policy.max_grad_norm)
        if not numpy.isfinite(norm):
            raise FloatingPointError(f"in step {training_step} the gradient's norm is {norm}, so no weight was changed")
        self._optimizer.step()
        self._optimizer.zero_grad()
        watch.mark("optimizer")
        self._version += 1
        return StepResult(sums, norm, lr, watch.seconds(), self._peak_memory_gib())

    def _forward_backward(self, micro_batch: MicroBatch, watch: Stopwatch) -> LossSums:
        batch = micro_batch.to(self._device)
        temperature = self._config.policy.generation.temperature
        logprobs_T, entropy_T = self._model(
            batch.token_ids_T, batch.position_ids_T, batch.lengths, temperature, batch.mask_T
        )
        loss, sums = policy_loss(logprobs_T, entropy_T, batch, self._config.loss_fn)
        watch.mark("forward")
        # FSDP averages gradients over data-parallel ranks; the loss is already a sum of their parts of one mean.
        torch.autograd.backward(loss * (self._num_ranks // self._config.policy.dtensor_cfg.tensor_parallel_size))
        watch.mark("backward")
        return sums

    def _peak_memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch], of: Scorer) -> list[NDArray[numpy.float32]]:
        """Of each micro-batch, the logprobs of its trained tokens: [T], 0 elsewhere."""
        model = self._model
        context: AbstractContextManager[None] = nullcontext()
        if of == "reference":
            if self._reference is not None:
                model = self._reference
            else:
                assert self._adapters is not None
                context = self._adapters.off()
        with context:
            found = []
            for micro_batch in micro_batches:
                batch = micro_batch.to(self._device)
                temperature = self._config.policy.generation.temperature
                logprobs_T, _ = model(batch.token_ids_T, batch.position_ids_T, batch.lengths, temperature, batch.mask_T)
                found.append(logprobs_T.float().cpu().numpy())
            return found

    def gather_weights(self) -> Weights | None:
        """The whole model, adapters merged in, on rank 0; None on the others."""
        state = self._gather()
        return None if state is None else Weights(self._version, self._merged(state))

    def _gather(self) -> dict[str, torch.Tensor] | None:
        state = get_model_state_dict(self._causal_lm, options=_WHOLE)
        if self._rank:
            return None
        weights = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        # Gathered twice, tied weights would be two.
        return weights | {name: weights[source] for name, source in self._skeleton.all_tied_weights_keys.items()}

    def _merged(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state if self._adapters is None else self._adapters.merged(state)

    def lay_weights(self, ways: Sequence[Way], folder: str) -> dict[Way, Any] | None:
        """On rank 0, for each of these ways of theirs, what engines are told of the weights as they are now: that they
        lie in shared memory, in a file of `folder`, or will be streamed (see `stream_weights`). None on other ranks."""
        found: dict[Way, Any] = {}
        if "shared" in ways:
            found["shared"] = self.share_weights()
        if "disk" in ways:
            found["disk"] = self._save_weights(Path(folder))
        if self._rank:
            return None
        if streamed := {"broadcast", "ipc"} & {*ways}:
            told = StreamedWeights(self._version, self._table(), not self._has_told_digest)
            self._has_told_digest = True
            found |= dict.fromkeys(streamed, told)  # type: ignore[arg-type]
        return found

    def open_channel(self, address: str) -> int:
        """On rank 0: the port at `address` where both ends of a channel meet, which takes the place of the last."""
        self._meeting = self._connect(address, port=0)
        return int(self._meeting.port)

    def connect(self, way: Way, address: str, port: int, size: int) -> None:
        """Join a channel to engines: each rank one to the same GPU's, or rank 0 a broadcast to all."""
        self._channels[way] = None
        if way == "ipc" or self._rank == 0:
            self._channels[way] = connect(
                way,
                address,
                port,
                rank=0,
                size=size,
                device=self._device,
                timeout_seconds=self._timeout.total_seconds(),
            )

    def stream_weights(self, way: Way, table: Sequence[Entry]) -> tuple[int, str]:
        """Send the weights as they are now over the channel; their version, and the digest of what was sent."""
        digest = send(self._channels[way], table, self._stream(), self._device)
        return self._version, digest

    def _table(self) -> list[Entry]:
        state = self._skeleton.state_dict() if self._adapters is not None else self._causal_lm.state_dict()
        return lay_out(state, self._precision)

    @torch.no_grad()
    def _stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensor by tensor, each gathered on every rank's device as it comes. Adapters are merged on rank 0, alone."""
        if self._adapters is not None:
            weights = self.gather_weights()
            yield from () if weights is None else weights.tensors.items()
            return
        for name, tensor in self._causal_lm.state_dict().items():
            part = tensor.to(self._device, self._precision if tensor.is_floating_point() else None)
            yield name, part.full_tensor() if isinstance(part, DTensor) else part

    def _save_weights(self, folder: Path) -> SavedWeights | None:
        weights = self.gather_weights()
        if weights is None:
            return None
        folder.mkdir(exist_ok=True)
        # Of their own, as the file has no room for two names of the same memory.
        table = lay_out(weights.tensors, self._precision)
        tensors = {
            entry.name: weights.tensors[entry.name].to(getattr(torch, entry.dtype), copy=True).contiguous()
            for entry in table
        }
        path = folder / f"version_{weights.version}.safetensors"
        beside = path.with_suffix(".unfinished")
        save_file(tensors, beside)
        os.replace(beside, path)
        for old in {*folder.glob("version_*.safetensors")} - {path}:
            old.unlink()
        return SavedWeights(weights.version, str(path), table, self._digest_once(tensors))

    def _digest_once(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Once is enough to know that nothing changes on the way."""
        if self._has_told_digest:
            return None
        self._has_told_digest = True
        return digest(tensors)

    def share_weights(self) -> SharedWeights | None:
        """The whole model, in the engines' precision, in memory of rank 0's node, until the next call; None on other
        ranks."""
        if self._rank:
            for _ in self._stream():
                pass
            return None
        self._shared.fill(table := self._table(), self._stream())
        shared = SharedWeights(self._version, self._shared.path, table)
        return shared if self._has_told_digest else replace(shared, digest=self._digest_once(shared.opened().tensors))

    def rest(self) -> None:
        """Keep weights and optimiser in the CPU's memory until `wake`. What is gathered meanwhile is gathered there."""
        self._move("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Have all on the device again."""
        self._move(self._device)

    @torch.no_grad()
    def _move(self, device: torch.device | str) -> None:
        if self._config.policy.dtensor_cfg.cpu_offload:
            return  # between their uses they are there in any case
        for model in (self._model, self._reference):
            if model is not None:
                model.to(device)
        for state in self._optimizer.state.values():
            for name, value in state.items():
                # A count of steps lies where the optimiser wants it.
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[name] = value.to(device)

    def save(self, folder: str) -> None:
        """Copy the whole state to rank 0's memory, whose thread then writes `model/`, `adapter/` if there are any and
        `optimizer.pt`."""
        state = self._gather()
        optimizer: dict[str, Any] = {}
        if self._optimizer.state:  # torch would make an update by zero to have one, and count it
            optimizer = get_optimizer_state_dict(self._causal_lm, self._optimizer, options=_WHOLE)
        if state is not None:
            live = tree_leaves([list(self._model.parameters()), self._optimizer.state_dict()["state"]])
            state, optimizer = apart(state, live), apart(optimizer, live)
            write = partial(self._write, Path(folder), state, optimizer)
            self._writer.start(Path(folder), write, state, optimizer)

    def _write(self, folder: Path, state: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        """In the writer's thread, while this rank goes on training: of the model it may take what does not change."""
        self._skeleton.save_pretrained(folder / "model", state_dict=self._merged(state))
        if self._adapters is not None:
            self._adapters.save(state, folder / "adapter")
        torch.save(optimizer, folder / "optimizer.pt")

    def written(self) -> dict[str, str] | None:
        """On rank 0: what `Writer.result` says of the last `save`."""
        return self._writer.result()

    def describe(self) -> Description:
        """The model's shape, and the name of the device."""
        on_gpu = self._device.type == "cuda"
        return Description(shape_of(self._causal_lm), torch.cuda.get_device_name(self._device) if on_gpu else "CPU")
