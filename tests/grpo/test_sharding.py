"""Every way of spreading a model over ranks trains the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from slurmkit.config.schema import TrainConfig
from slurmkit.config.section import ValidationError
from slurmkit.errors import UserError
from slurmkit.grpo.causal_lm import check_model, generic_name
from tests.support.policy_ranks import ROUNDS, Work, assert_alike, run_ranks
from tests.support.small_models import make_model, tiny_llama
from tests.support.tiny_model import make_tiny_model, tiny_config


@pytest.fixture(scope="module", params=["llama", "qwen"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with grouped heads, tied embeddings and an odd width, one with norms inside a head."""
    make = {"llama": tiny_llama, "qwen": make_tiny_model}[request.param]
    return make(tmp_path_factory.mktemp(request.param) / "model")


def test_sharded_and_tensor_parallel_ranks_match_one_rank_also_on_resume(model_path: Path, tmp_path: Path) -> None:
    one = Work(tmp_path / "one", model_path)
    expected = run_ranks(1, one)
    four = Work(tmp_path / "four", model_path, tensor_parallel_size=2)
    assert_alike(run_ranks(4, four), expected)
    last = len(ROUNDS) - 1
    ahead = Work(tmp_path / "ahead", four.saved / "model", checkpoint=four.saved, first=last)
    assert_alike(run_ranks(1, ahead), expected)
    back = Work(tmp_path / "back", one.saved / "model", checkpoint=one.saved, first=last, tensor_parallel_size=2)
    assert_alike(run_ranks(4, back), expected)


def test_hybrid_sharding_with_recomputation_and_offload_trains_as_one_rank(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    settings = {"hybrid_sharding": True, "activation_checkpointing": True, "cpu_offload": True}
    found = run_ranks(4, Work(tmp_path / "four", path, {"dtensor_cfg": settings}, num_nodes=2))
    assert_alike(found, run_ranks(1, Work(tmp_path / "one", path)))


def config(path: Path, *, tensor_parallel_size: int, gpus: int = 2) -> TrainConfig:
    policy: dict[str, Any] = {"model_name": str(path), "from_scratch": None}
    policy["dtensor_cfg"] = {"tensor_parallel_size": tensor_parallel_size}
    return tiny_config(path.parent, policy=policy, cluster={"gpus_per_node": gpus})


def test_tensor_parallel_ranks_count_as_one_and_must_fit_in_a_node(tmp_path: Path) -> None:
    assert config(tmp_path / "model", tensor_parallel_size=2).num_data_parallel_ranks == 1
    assert config(tmp_path / "model", tensor_parallel_size=2, gpus=8).num_data_parallel_ranks == 4
    with pytest.raises(ValidationError, match=r"tensor_parallel_size 3 must divide the 4 policy ranks of a node"):
        config(tmp_path / "model", tensor_parallel_size=3, gpus=4)
    with pytest.raises(ValidationError, match=r"leaves some of the 8 data-parallel ranks without a sample"):
        config(tmp_path / "model", tensor_parallel_size=1, gpus=8)


@pytest.mark.parametrize(
    ("size", "gpus", "changes", "message"),
    [
        (4, 4, {"num_key_value_heads": 2}, "tensor_parallel_size 4 must divide num_key_value_heads of .*, which is 2"),
        (2, 2, {"intermediate_size": 65}, "out_features 65 of layers.0.mlp.gate_proj in .* cannot be divided by 2"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_by_name(
    size: int, gpus: int, changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = tiny_llama(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        check_model(path, config(path, tensor_parallel_size=size, gpus=gpus))


def test_a_model_without_a_tensor_parallel_plan_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "gpt2", GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(UserError, match=r"transformers has no tensor-parallel plan for .*gpt2 .*: set 1"):
        check_model(path, config(path, tensor_parallel_size=2))
    check_model(path, config(path, tensor_parallel_size=1))


def test_only_the_layers_number_is_a_wildcard() -> None:
    assert generic_name("layers.12.mlp.experts.3.w1") == "layers.*.mlp.experts.*.w1"
