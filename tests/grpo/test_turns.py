"""Policy and engines that share GPUs: whose memory is there when, and that nothing is lost on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from slurmkit.grpo.turns import Turns
from tests.support.driver import TINY, run
from tests.support.policy_ranks import Work, assert_alike, run_ranks
from tests.support.requirements import need_gpu
from tests.support.tiny_model import make_tiny_model, tiny_config


class Records:
    """Everybody at once; what each has of the GPU, after each call."""

    def __init__(self) -> None:
        self.calls = list[str]()
        self.has = {"policy", "weights", "kv_cache"}

    def _done(self, call: str) -> None:
        self.calls.append(call)
        assert not {"policy", "kv_cache"} <= self.has, f"after {call} both are there"

    async def rest(self) -> None:
        self.has.discard("policy")
        self._done("policy rests")

    async def sleep(self) -> None:
        self.has -= {"weights", "kv_cache"}
        self._done("engines sleep")

    async def load(self, transfer: object) -> None:
        assert {"policy", "weights"} <= self.has, "there is nothing to copy from, or nowhere to copy to"
        self._done("weights come")


class PolicySide(Records):
    async def wake(self) -> None:
        self.has.add("policy")
        self._done("policy wakes")


class EngineSide(Records):
    async def wake(self, what: str) -> None:
        self.has.add(what)
        self._done(f"{what} wake")


def both(*, are_taken: bool) -> tuple[Turns, Records]:
    policy, pool = PolicySide(), EngineSide()
    pool.has, pool.calls = policy.has, policy.calls
    sides: Any = (policy, pool, None)
    return Turns(*sides, are_taken), policy


def test_engines_sleep_during_training_and_wake_in_an_order_fitting_memory() -> None:
    turns, seen = both(are_taken=True)

    async def steps() -> None:
        await turns.begin()
        await turns.of_policy()
        await turns.of_engines()
        await turns.of_policy()  # a step that teaches nothing
        await turns.of_engines(have_changed=False)

    asyncio.run(steps())
    to_policy, to_engines = ["engines sleep", "policy wakes"], ["policy rests", "kv_cache wake"]
    assert seen.calls == [
        "policy rests",
        *(*to_policy, "weights wake", "weights come", *to_engines),
        *(*to_policy, "weights wake", *to_engines),
    ]
    assert seen.has == {"weights", "kv_cache"}


def test_where_nobody_takes_turns_there_are_new_weights_and_nothing_else() -> None:
    turns, seen = both(are_taken=False)
    seen.has.discard("kv_cache")  # of which this test has nothing to say

    async def steps() -> None:
        await turns.begin()
        await turns.of_policy()
        await turns.of_engines()
        await turns.of_engines(have_changed=False)

    asyncio.run(steps())
    assert seen.calls == ["weights come"]


@pytest.mark.parametrize(
    ("gpus", "generation", "grpo", "expected"),
    [
        (4, {"backend": "vllm"}, {}, True),
        (4, {"backend": "torch"}, {}, False),
        (0, {"backend": "vllm"}, {}, False),
        (4, {"backend": "vllm", "colocated": {"enabled": False, "resources": {"gpus_per_node": 2}}}, {}, False),
        (4, {"backend": "vllm"}, {"async_grpo": {"enabled": True}}, False),
        (4, {"backend": "vllm"}, {"async_grpo": {"enabled": True, "max_trajectory_age_steps": 0}}, True),
    ],
)
def test_only_colocated_synchronous_engines_take_turns_with_the_policy(
    tmp_path: Path, gpus: int, generation: dict[str, Any], grpo: dict[str, Any], expected: bool
) -> None:
    config = tiny_config(
        tmp_path,
        grpo=grpo,
        policy={"from_scratch": {}, "generation": generation},
        loss_fn={"use_importance_sampling_correction": True},
        cluster={"gpus_per_node": gpus},
    )
    assert config.takes_turns == expected


def test_offloading_the_policy_between_updates_does_not_change_training(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    found = [run_ranks(2, Work(tmp_path / str(rests), model, rests=rests)) for rests in (True, False)]
    assert_alike(*found)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="taking turns"),
        pytest.param(("policy.generation.vllm_cfg.tensor_parallel_size=2", "cluster.gpus_per_node=2"), id="two GPUs"),
        pytest.param(
            (
                "cluster.gpus_per_node=2",
                "policy.generation.colocated.enabled=false",
                "policy.generation.colocated.resources.gpus_per_node=1",
            ),
            id="apart",
        ),
        pytest.param(("policy.generation.weight_transfer=disk",), id="disk"),
    ],
)
def test_engines_on_gpus_sample_with_the_policy_weights_after_every_update(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    need_gpu()
    if "cluster.gpus_per_node=2" in settings and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sizes = ("policy.from_scratch.head_dim=64", "policy.generation.vllm_cfg.gpu_memory_utilization=0.4")
    backend = ("policy.generation.backend=vllm", "cluster.gpus_per_node=1", "grpo.max_num_steps=4")
    done = run(tmp_path, TINY, *backend, *sizes, *settings, timeout=500)
    assert done.code == 0, done.errors
    assert max(done.values("train:token_mult_prob_error")) < 1 + 1e-2
    assert max(done.values("train:grad_norm")) > 0.01
