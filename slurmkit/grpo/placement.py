"""Who sits where: policy ranks and engines on the nodes and GPUs that Ray has.

Nodes are in the order of their addresses, a node's GPUs in that of their numbers. Where policy and engines are apart,
the policy has the first nodes, or the first GPUs of the only one.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import Failure, NodeFailure

_NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class Seat:
    """A bundle of a placement group: a GPU, or a node without one. A policy rank, an engine's part, or both sit there.

    `gpu` is as CUDA_VISIBLE_DEVICES would name it on the node. Example: "3".
    """

    group: PlacementGroup
    index: int
    node_id: str
    address: str
    cpus: float
    gpu: str | None = None

    def options(self) -> dict[str, Any]:
        """Of an actor that sits there, perhaps beside another.

        GPUs are taken by the bundle: actors are told theirs, as an engine may have several.
        """
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.index)
        return {"num_cpus": self.cpus / 2, "num_gpus": 0, "scheduling_strategy": strategy}


@dataclass(frozen=True, slots=True)
class Layout:
    """`policy` has a seat for each rank, `engines` one or, where they are tensor parallel, several for each engine."""

    policy: Sequence[Seat]
    engines: Sequence[Sequence[Seat]]


def reserve(config: TrainConfig) -> Layout:
    """Take what the run needs of Ray. Failure where there is no room, NodeFailure where a node is lost."""
    nodes = _whole_nodes(config)
    of_policy, of_engines = nodes[: config.num_policy_nodes], nodes[-config.num_engine_nodes :]
    if not config.cluster.gpus_per_node:
        return Layout(of_policy, [[seat] for seat in of_engines])
    # A bundle that has several GPUs does not say which of them an actor gets, so each GPU becomes one.
    remove_placement_group(nodes[0].group)
    size = config.policy.generation.vllm_cfg.tensor_parallel_size
    policy, engines = list[list[Seat]](), list[list[Seat]]()
    for node in nodes:
        is_shared = config.policy.generation.colocated.enabled
        if node in of_policy and not is_shared:
            policy.append(_on_one_node(config, node, config.ranks_per_node))
        own = config.engine_gpus_per_node // size if node in of_engines else 0
        groups = [_on_one_node(config, node, size) for _ in range(own)]
        engines += groups
        policy += groups if is_shared else []
    found = _with_gpus([seat for group in (*policy, *engines) for seat in group])
    order = {node.node_id: number for number, node in enumerate(nodes)}

    def place(seat: Seat) -> tuple[int, int, str]:
        gpu = seat.gpu or ""
        return order[seat.node_id], int(gpu) if gpu.isdigit() else 0, gpu

    def seats_of(group: Sequence[Seat]) -> list[Seat]:
        return sorted((found[seat.group.id, seat.index] for seat in group), key=place)

    return Layout(
        sorted((seat for group in policy for seat in seats_of(group)), key=place),
        sorted((seats_of(group) for group in engines), key=lambda seats: place(seats[0])),
    )


def is_alive(node_id: str) -> bool:
    """Whether Ray still has the node."""
    return any(node["Alive"] for node in _nodes() if node["NodeID"] == node_id)


def _whole_nodes(config: TrainConfig) -> list[Seat]:
    """One bundle per node, with all that the run takes of it."""
    nodes, gpus = config.cluster.num_nodes, config.cluster.gpus_per_node
    bundle = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    _wait(group, config)
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in _nodes()}
    placed = placement_group_table(group)["bundles_to_node_id"]
    seats = [Seat(group, index, node, address_of[node], cpus=1) for index, node in placed.items()]
    return sorted(seats, key=lambda seat: (ipaddress.ip_address(seat.address), seat.index))


def _on_one_node(config: TrainConfig, node: Seat, gpus: int) -> list[Seat]:
    """A bundle for each of so many GPUs of a node that was found to have room."""
    # A node may register a single CPU; Ray counts in ten thousandths.
    cpus = int(10_000 / config.cluster.gpus_per_node) / 10_000
    group = placement_group(
        [{"CPU": cpus, "GPU": 1}] * gpus,
        strategy="STRICT_PACK",
        bundle_label_selector=[{_NODE_LABEL: node.node_id}] * gpus,
    )
    _wait(group, config)
    return [Seat(group, index, node.node_id, node.address, cpus) for index in range(gpus)]


def _with_gpus(seats: Sequence[Seat]) -> dict[tuple[Any, int], Seat]:
    """The seats by group and number, with the GPU that each has."""
    unique = {(seat.group.id, seat.index): seat for seat in seats}
    asked = [_gpu.options(**seat.options() | {"num_gpus": 1}).remote() for seat in unique.values()]
    gpus = ray.get(asked)
    return {
        key: Seat(seat.group, seat.index, seat.node_id, seat.address, seat.cpus, gpu)
        for (key, seat), gpu in zip(unique.items(), gpus, strict=True)
    }


@ray.remote
def _gpu() -> str:
    return str(ray.get_gpu_ids()[0])


def _wait(group: PlacementGroup, config: TrainConfig) -> None:
    if group.wait(config.cluster.placement_timeout_seconds):
        return
    nodes, gpus = config.cluster.num_nodes, config.cluster.gpus_per_node
    alive = [node["Resources"] for node in _nodes() if node["Alive"]]
    has = "; ".join(f"{found.get('CPU', 0):g} CPU, {found.get('GPU', 0):g} GPU" for found in alive)
    # A Ray that was brought up with as many nodes as are asked for has lost some.
    kind = NodeFailure if os.environ.get("RAY_ADDRESS") and len(alive) < nodes else Failure
    raise kind(
        f"no room for the run after {config.cluster.placement_timeout_seconds:g} s: it asks for {nodes} node(s) "
        f"with 1 CPU and {gpus} GPU each (cluster.num_nodes, cluster.gpus_per_node); Ray has {len(alive)} "
        f"node(s): {has}"
    )


def _nodes() -> list[dict[str, Any]]:
    return list(ray.nodes())  # type: ignore[no-untyped-call]
