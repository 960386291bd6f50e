"""Spreading a model over ranks: FSDP2 over all of them or inside nodes, tensor parallel between neighbours.

Ranks are numbered so that those of one tensor-parallel group are neighbours, and those of one node follow each other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from slurmkit.config.model import DtensorCfg
from slurmkit.grpo.causal_lm import decoder_layers, generic_name, tensor_parallel_plan


@dataclass(frozen=True, slots=True)
class Meshes:
    """`data` is what FSDP2 shards over (its second dimension) and replicates over (its first), if it has two."""

    data: DeviceMesh
    tensor: DeviceMesh | None


def make_meshes(device_type: str, num_ranks: int, num_nodes: int, settings: DtensorCfg) -> Meshes:
    """Collective: every rank calls it."""
    tensor = settings.tensor_parallel_size
    shape, names = [num_ranks // tensor], ["shard"]
    if settings.hybrid_sharding and num_nodes > 1:
        shape, names = [num_nodes, num_ranks // tensor // num_nodes], ["replicate", "shard"]
    if tensor == 1:
        return Meshes(init_device_mesh(device_type, tuple(shape), mesh_dim_names=tuple(names)), None)
    # It warns of collectives over one dimension after the other, whose order is ours to choose.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    mesh = init_device_mesh(device_type, (*shape, tensor), mesh_dim_names=(*names, "tensor"))
    return Meshes(mesh[tuple(names)], mesh["tensor"])


def shard(
    model: torch.nn.Module, causal_lm: Any, meshes: Meshes, settings: DtensorCfg, *, precision: str
) -> list[torch.nn.Module]:
    """Spread `model`, around `causal_lm`, whose weights rank 0 alone has, over all ranks. Collective.

    Layer by layer, so that no device ever holds the whole. Returns the modules whose parameters' gradients are to be
    summed over the tensor-parallel ranks (`sum_over_tensor_ranks`).
    """
    device = torch.device(meshes.data.device_type)
    options: dict[str, Any] = {
        "mesh": meshes.data,
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, precision), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if settings.cpu_offload
        else OffloadPolicy(),
    }
    if meshes.tensor is not None:
        options["shard_placement_fn"] = _across
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, precision))  # as it will be computed with in any case
    names = {module: name for name, module in causal_lm.base_model.named_modules()}
    plan = tensor_parallel_plan(causal_lm) if meshes.tensor is not None else {}
    partly: list[torch.nn.Module] = []

    def place(part: torch.nn.Module) -> None:
        _spread([*part.parameters(), *part.buffers()], device)
        for module in list(part.modules()):
            match plan.get(generic_name(names.pop(module, ""))):
                case "colwise":
                    parallelize_module(module, meshes.tensor, ColwiseParallel(), src_data_rank=None)
                case "rowwise":
                    parallelize_module(module, meshes.tensor, RowwiseParallel(), src_data_rank=None)
                case "replicated_with_grad_allreduce":
                    partly.append(module)

    for layer in decoder_layers(causal_lm):
        place(layer)
        if settings.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, **options)
    place(model)
    fully_shard(model, **options)
    return partly


def _across(parameter: torch.nn.Parameter) -> Shard | None:
    # What tensor parallelism has cut along one dimension FSDP2 cuts along the other: cut twice along the same one, a
    # tensor whose parts are not all alike could not be put together again.
    is_cut = isinstance(parameter, DTensor) and parameter.placements == (Shard(0),) and parameter.ndim > 1
    return Shard(1) if is_cut else None


def _spread(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Give every rank, on its device, what rank 0 has; what is sharded has been given already."""
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
            distributed.broadcast(tensor.data, src=0)


def sum_over_tensor_ranks(modules: Iterable[torch.nn.Module], meshes: Meshes) -> None:
    """Add up gradients that are each rank's part, of weights that every tensor-parallel rank has whole. Collective."""
    for module in modules:
        for parameter in module.parameters():
            gradient: Any = parameter.grad
            if gradient is not None and meshes.tensor is not None:
                distributed.all_reduce(gradient.to_local(), group=meshes.tensor.get_group())
