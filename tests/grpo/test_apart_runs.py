"""Runs on two nodes whose engines are apart from the policy, or get weights on another way than by memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driver import TINY, run, two_ray_nodes

pytestmark = pytest.mark.ray

APART = (
    "cluster.num_nodes=2",
    "policy.generation.colocated.enabled=false",
    "policy.generation.colocated.resources.num_nodes=1",
    "grpo.max_num_steps=3",
)
# Wide enough for vLLM's kernels, and the same model for all.
HEADS = "policy.from_scratch.head_dim=32"
TWO_PROCESSES = (
    "policy.generation.backend=vllm",
    "policy.generation.vllm_cfg.tensor_parallel_size=2",
    "policy.generation.vllm_cfg.kv_cache_memory_bytes=16777216",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with two_ray_nodes(tmp_path_factory.mktemp("nodes")) as (address, _):
        yield address


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((*APART, "policy.generation.weight_transfer=disk"), id="torch apart, by disk"),
        pytest.param((*APART, *TWO_PROCESSES), id="vllm apart, on two processes", marks=pytest.mark.vllm),
        pytest.param(
            ("cluster.num_nodes=2", "grpo.max_num_steps=3"), id="memory and broadcast", marks=pytest.mark.nightly
        ),
    ],
)
def test_engines_sample_with_the_policys_weights_after_every_update(
    tmp_path: Path, address: str, settings: tuple[str, ...]
) -> None:
    done = run(tmp_path, TINY, HEADS, *settings, RAY_ADDRESS=address)
    assert done.code == 0, done.errors
    errors = done.values("train:token_mult_prob_error")
    assert len(errors) >= 2
    assert max(errors) < 1 + 1e-3
    assert max(done.values("train:grad_norm")) > 0.01
    assert len(list(tmp_path.glob("weights/version_*.safetensors"))) == ("disk" in str(settings))
