"""Weights that stream: buckets over a process group of their own, and what both sides are told when it fails."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from slurmkit.errors import Failure, NodeFailure
from slurmkit.generation import channels
from slurmkit.generation.machine import use_interface_to
from slurmkit.generation.shared_tensors import lay_out
from slurmkit.generation.transfer import PolicyLost, WeightTransfer
from slurmkit.generation.weights import StreamedWeights
from slurmkit.grpo.policy_worker import PolicyWorker
from tests.support.cluster import Cluster
from tests.support.requirements import need_gpu, unchanged_environment
from tests.support.tiny_model import tiny_config

CPU = torch.device("cpu")
WEIGHTS = {
    "large": torch.randn(300, 7),
    "small": torch.randn(3),
    "whole numbers": torch.arange(5),
    "nothing": torch.zeros(0, 4),
    "last": torch.randn(11, 5),
}


def store() -> Any:
    return distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]


def ends(way: str, port: int, count: int, seconds: float = 30) -> list[channels.Channel]:
    """Of a channel, the sender's first: threads of this process, as joining waits for all."""

    def join(rank: int) -> channels.Channel:
        return channels.connect(way, "127.0.0.1", port, rank=rank, size=count, device=CPU, timeout_seconds=seconds)

    with unchanged_environment(), ThreadPoolExecutor(count) as threads:
        return list(threads.map(join, range(count)))


# One end of a channel. Its arguments: rank 0's address, its own rank.
END = """
import sys, torch
from torch import distributed
from slurmkit.generation import channels
address, rank = sys.argv[1], int(sys.argv[2])
store = distributed.TCPStore(address, 29555, None, True, wait_for_workers=False) if rank == 0 else None
channel = channels.connect(
    "broadcast", address, 29555, rank=rank, size=2, device=torch.device("cpu"), timeout_seconds=40
)
if rank == 0:
    channel.send(torch.arange(5, dtype=torch.uint8))
else:
    print(channel.receive(5).tolist())
"""


def test_nodes_whose_own_name_leads_to_the_loopback_reach_each_other(cluster: Cluster, shared_path: Path) -> None:
    script = shared_path / "end.py"
    script.write_text(END)
    address = cluster.on_node("node1", "getent", "hosts", "node1").split()[0]

    def end(rank: int) -> str:
        # As where a node's /etc/hosts has its name beside 127.0.0.1.
        renamed = ("unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$@"', "sh")
        return cluster.on_node(f"node{rank + 1}", *renamed, sys.executable, str(script), address, str(rank))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(end, range(2))) == ["", "[0, 1, 2, 3, 4]\n"]


def test_the_interface_that_a_user_has_chosen_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    with unchanged_environment():
        use_interface_to("127.0.0.1")
        found = {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    assert found == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_every_engine_gets_every_tensor_whatever_the_size_of_a_bucket(
    monkeypatch: pytest.MonkeyPatch, bucket_bytes: int, precision: torch.dtype | None
) -> None:
    monkeypatch.setattr(channels, "BUCKET_BYTES", bucket_bytes)
    meeting, table = store(), lay_out(WEIGHTS, precision)
    sender, *receivers = ends("broadcast", meeting.port, 3)
    digests: list[list[str]] = [[], []]

    def take(number: int) -> dict[str, torch.Tensor]:
        return dict(channels.digested(channels.receive(receivers[number], table), digests[number]))

    with ThreadPoolExecutor(2) as threads:
        taking = [threads.submit(take, number) for number in range(2)]
        sent = channels.send(sender, table, WEIGHTS.items(), CPU)
        found = [each.result() for each in taking]
    assert digests == [[sent], [sent]]
    for each in found:
        assert each.keys() == WEIGHTS.keys()
        # All of them at the end: no bucket is written over while somebody may still read it.
        for name, tensor in WEIGHTS.items():
            expected = tensor.to(precision) if precision and tensor.is_floating_point() else tensor
            assert each[name].dtype == expected.dtype
            assert torch.equal(each[name], expected)


def test_a_sender_whose_receiver_does_not_come_ends_with_an_error_in_time() -> None:
    meeting = store()
    sender, _ = ends("broadcast", meeting.port, 2, seconds=1)
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        channels.send(sender, lay_out(WEIGHTS), WEIGHTS.items(), CPU)


def test_tensors_that_come_in_another_order_than_was_told_are_not_sent() -> None:
    class Nobody:
        def send(self, bucket: torch.Tensor) -> None:
            raise AssertionError("sent")

    other = dict(reversed(WEIGHTS.items()))
    with pytest.raises(RuntimeError, match="the policy's weights came as last, not as large"):
        channels.send(Nobody(), lay_out(WEIGHTS), other.items(), CPU)  # type: ignore[arg-type]


class Side:
    """An actor that answers as told: values, errors, or nothing for a long time."""

    timeout_seconds = 5.0

    def __init__(self, name: str, **answers: Any) -> None:
        self.name, self.handle, self.calls = name, object(), list[str]()
        self._answers = {"lay_weights": {"broadcast": StreamedWeights(3, lay_out(WEIGHTS), True)}} | answers

    async def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        answer = self._answers.get(method)
        if isinstance(answer, Exception):
            raise answer
        if answer == "never":
            await asyncio.sleep(1000)
        return answer


def transfer(rank: Side, *engines: Side) -> WeightTransfer:
    sides: Sequence[Any] = engines
    return WeightTransfer([rank], "here", sides, ["broadcast"] * len(sides), folder=Path("/nowhere"))  # type: ignore[list-item]


async def brought(made: WeightTransfer, *parties: list[int]) -> list[bool]:
    await made.prepare()
    return [await made.send(party) for party in parties or made.parties()]


def test_a_channel_connects_engines_once_and_again_after_a_restart() -> None:
    rank = Side("policy rank 0", stream_weights=(3, "abc"))
    engines = [Side(f"engine {number}", load=["abc"]) for number in range(2)]
    made = transfer(rank, *engines)

    async def work() -> None:
        assert await brought(made, [0, 1], [0, 1]) == [True, True]
        engines[1].handle = object()
        assert await brought(made, [1]) == [True]
        assert await brought(made) == [True]

    asyncio.run(asyncio.wait_for(work(), 10))
    assert [engine.calls.count("connect") for engine in engines] == [2, 3]
    assert [engine.calls.count("load") for engine in engines] == [3, 4]


def test_weights_that_changed_on_the_way_end_the_run_with_both_digests() -> None:
    made = transfer(Side("policy rank 0", stream_weights=(3, "abc")), Side("engine 0", load=["abc", "abd"]))
    with pytest.raises(Failure, match="version 3 changed on the way to engine 0: SHA-256 abc was sent, abd arrived"):
        asyncio.run(asyncio.wait_for(brought(made), 10))


def test_an_engine_restarted_during_training_is_reported_ahead() -> None:
    made = transfer(Side("policy rank 0", stream_weights=(4, "abc")), Side("engine 0", load=["abc"]))
    assert asyncio.run(asyncio.wait_for(brought(made), 10)) == [False]


@pytest.mark.parametrize(
    ("rank", "engine", "kind"),
    [
        ({"stream_weights": "never"}, {"load": Failure("engine 0 failed: no room")}, Failure),
        ({"stream_weights": Failure("rank 0 failed")}, {"load": NodeFailure("engine 0 failed: no room")}, NodeFailure),
        ({"stream_weights": NodeFailure("rank 0 died")}, {"load": Failure("engine 0 failed: no room")}, PolicyLost),
    ],
)
def test_a_transfer_that_fails_says_how_everybody_stands(
    monkeypatch: pytest.MonkeyPatch, rank: dict[str, Any], engine: dict[str, Any], kind: type[Exception]
) -> None:
    monkeypatch.setattr("slurmkit.generation.transfer._GRACE", 0.05)
    made = transfer(Side("policy rank 0", **rank), Side("engine 0", **engine), Side("engine 1", load=[]))
    with pytest.raises(kind) as caught:
        asyncio.run(asyncio.wait_for(brought(made), 10))
    assert type(caught.value) is kind
    first = rank["stream_weights"]
    state = "policy rank 0: still waiting" if first == "never" else str(first)
    assert str(caught.value) == (
        "the weights of version 3 did not get to the engines (broadcast): "
        f"{state}; engine 0 failed: no room; engine 1: done"
    )


def policy_rank(folder: Path) -> PolicyWorker:
    """A policy rank of a run on GPUs, before it joins the other ranks."""
    config = tiny_config(folder, cluster={"gpus_per_node": 1})
    return PolicyWorker(config, 0, 1, threads=torch.get_num_threads())


@pytest.mark.parametrize("way", ["ipc", "broadcast"])
def test_a_policy_rank_joins_a_channel_on_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: Any) -> None:
    chosen = list[int]()
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(channels, "_Ipc", lambda store, device: None)
    monkeypatch.setattr(channels, "_Broadcast", lambda store, rank, size, device, timeout: None)
    rank = policy_rank(tmp_path)
    with unchanged_environment():
        rank.connect(way, "127.0.0.1", rank.open_channel("127.0.0.1"), size=1)
    assert chosen == [0]


def _take(port: int, table: Any, answers: Any) -> None:
    device = torch.device("cuda", 0)
    channel = channels.connect("ipc", "127.0.0.1", port, rank=1, size=2, device=device, timeout_seconds=60)
    for _ in range(2):
        digests = list[str]()
        for _ in channels.digested(channels.receive(channel, table), digests):
            pass
        answers.put(digests[0])


def test_memory_of_a_gpu_is_read_by_another_process_bucket_by_bucket(tmp_path: Path) -> None:
    need_gpu()
    device, meeting = policy_rank(tmp_path)._device, store()
    weights = {name: tensor.to(device) for name, tensor in WEIGHTS.items()}
    weights["larger than a bucket"] = torch.randn(channels.BUCKET_BYTES // 4 + 1, device=device)
    table, context = lay_out(weights, torch.bfloat16), multiprocessing.get_context("spawn")
    answers = context.Queue()
    taking = context.Process(target=_take, args=(meeting.port, table, answers))
    taking.start()
    with unchanged_environment():
        channel = channels.connect("ipc", "127.0.0.1", meeting.port, rank=0, size=2, device=device, timeout_seconds=60)
    for _ in range(2):
        assert channels.send(channel, table, weights.items(), device) == answers.get(timeout=60)
    taking.join(60)
    assert taking.exitcode == 0
