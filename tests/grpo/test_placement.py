"""Who sits where: on a real Ray of two nodes that say they have four GPUs each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from slurmkit.grpo import cluster
from tests.support.requirements import REPOSITORY
from tests.support.tiny_model import tiny_config

pytestmark = pytest.mark.ray

# Brings up the nodes, then answers each configuration with the layout: for each rank and engine, node and GPUs.
PROGRAM = """
import json, os, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import remove_placement_group
from slurmkit.errors import Failure
from slurmkit.grpo.placement import reserve
from tests.support.tiny_model import tiny_config

def whole(seats):
    return [(seat.node_id, seat.gpu, ray.get(told.options(**seat.options()).remote())) for seat in seats]

@ray.remote
def told():
    return ray.get_runtime_context().get_node_id()

if __name__ == "__main__":
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "num_gpus": 4, "include_dashboard": False})
    cluster.add_node(num_cpus=1, num_gpus=4)
    ray.init(address=cluster.address)
    for line in sys.stdin:
        asked = json.loads(line)
        config = tiny_config(
            Path("/nowhere"),
            grpo={"num_prompts_per_step": 8},
            policy={"from_scratch": {}, "train_global_batch_size": 16, "generation": asked["generation"]},
            cluster={"placement_timeout_seconds": 10.0} | asked["cluster"],
        )
        try:
            layout = reserve(config)
        except Failure as error:
            print(json.dumps(str(error)), flush=True)
            continue
        print(json.dumps([whole(layout.policy), [whole(engine) for engine in layout.engines]]), flush=True)
        for group in {seat.group.id: seat.group for part in (layout.policy, *layout.engines) for seat in part}.values():
            remove_placement_group(group)
"""


class Asks:
    """A program that is asked over a pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, cluster: dict[str, Any], **generation: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"cluster": cluster, "generation": generation}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def asked(folder: Path) -> Iterator[Asks]:
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=REPOSITORY,
        )
    try:
        yield Asks(process)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:
            if child.is_running():
                child.kill()


@pytest.fixture(scope="module")
def layout_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asks]:
    with asked(tmp_path_factory.mktemp("layout")) as asks:
        yield asks


def test_a_colocated_engine_of_two_gpus_shares_two_policy_ranks_in_order(layout_of: Asks) -> None:
    policy, engines = layout_of(
        {"num_nodes": 2, "gpus_per_node": 4}, backend="vllm", vllm_cfg={"tensor_parallel_size": 2}
    )
    assert [gpu for _, gpu, _ in policy] == ["0", "1", "2", "3"] * 2
    assert len({node for node, _, _ in policy[:4]}) == len({node for node, _, _ in policy[4:]}) == 1
    assert policy[0][0] != policy[4][0]
    assert [seat for engine in engines for seat in engine] == policy
    assert [len(engine) for engine in engines] == [2, 2, 2, 2]
    # And whoever is put into a seat is on its node.
    assert all(node == there for node, _, there in policy)


def test_engines_apart_have_the_last_node_or_the_last_gpus_of_the_only_one(layout_of: Asks) -> None:
    apart = {"enabled": False, "resources": {"num_nodes": 1}}
    policy, engines = layout_of(
        {"num_nodes": 2, "gpus_per_node": 4}, backend="vllm", vllm_cfg={"tensor_parallel_size": 4}, colocated=apart
    )
    assert [gpu for _, gpu, _ in policy] == ["0", "1", "2", "3"]
    assert [[gpu for _, gpu, _ in engine] for engine in engines] == [["0", "1", "2", "3"]]
    assert {node for node, _, _ in policy} != {node for node, _, _ in engines[0]}
    one = {"enabled": False, "resources": {"gpus_per_node": 1}}
    policy, engines = layout_of({"num_nodes": 1, "gpus_per_node": 3}, colocated=one)
    assert [gpu for _, gpu, _ in policy] + [gpu for ((_, gpu, _),) in engines] == ["0", "1", "2"]
    assert len({node for node, _, _ in [*policy, *engines[0]]}) == 1
    nodes, apart_nodes = layout_of({"num_nodes": 2, "gpus_per_node": 0}, colocated=apart)
    assert (len(nodes), len(apart_nodes)) == (1, 1)
    assert nodes[0][0] != apart_nodes[0][0][0]


def test_more_gpus_than_ray_has_are_refused_with_what_it_has(layout_of: Asks) -> None:
    message = layout_of({"num_nodes": 2, "gpus_per_node": 5, "placement_timeout_seconds": 1.0})
    assert "no room for the run after 1 s: it asks for 2 node(s) with 1 CPU and 5 GPU each" in message
    assert "Ray has 2 node(s): 1 CPU, 4 GPU; 1 CPU, 4 GPU" in message


def test_a_rank_and_an_engine_have_as_many_threads_as_the_user_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for given, threads in {"3": 3, "": 8, "0": 8, "4,2": 8}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert cluster._threads(tiny_config(tmp_path)) == threads
