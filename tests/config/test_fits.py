"""A training configuration that fits: its own numbers, and the job's nodes and GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.load import load_config
from slurmkit.config.section import ValidationError
from slurmkit.errors import UserError
from slurmkit.job.settle import Request, Settled, settle
from tests.support.tiny_model import tiny_config

CONFIG = """\
env: {name: arithmetic}
policy:
  from_scratch: {}
  train_global_batch_size: 16
grpo:
  num_prompts_per_step: 8
  num_generations_per_prompt: 4
"""


def settled(here: Path, *overrides: str, local: bool = False, **flags: Any) -> Settled:
    config = here / "train.yaml"
    config.write_text(CONFIG)
    return settle(Request(config=config, overrides=overrides, flags=flags, local=local), here)


def refusal(here: Path, *overrides: str, **flags: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        settled(here, *overrides, **flags)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ({"gres": "gpu:8"}, 8),
        ({"gres": "gpu:h100:4,gpu:a100:4"}, 8),
        ({"gpus_per_node": "h100:2"}, 2),
        ({"gpus": "16", "nodes": 2}, 8),
        ({"nodes": 2}, 0),
        ({"gres": "shard:4"}, 0),
        # Slurm alone knows how many these give, so the configuration's own default stands.
        ({"exclusive": True}, 1),
        ({"sbatch": {"gpus-per-task": "8"}}, 1),
        ({"exclusive": True, "gpus_per_node": "4"}, 4),
        ({"exclusive": "user"}, 0),
    ],
)
def test_a_run_trains_on_the_gpus_that_the_job_asks_for(here: Path, flags: dict[str, Any], gpus: int) -> None:
    job = settled(here, **flags)
    assert job.train is not None
    assert (job.train.cluster.gpus_per_node, job.train.cluster.num_nodes) == (gpus, flags.get("nodes", 1))
    assert job.config_origins["cluster.num_nodes"] == "the job's nodes"


def test_a_number_in_the_configuration_stands_and_a_local_run_asks_no_job(here: Path) -> None:
    job = settled(here, "cluster.gpus_per_node=2", gres="gpu:8")
    assert job.train is not None
    assert job.train.cluster.gpus_per_node == 2
    (here / "slurmkit.yaml").write_text("gres: gpu:8\n")
    local = settled(here, local=True)
    assert local.train is not None
    assert local.train.cluster.gpus_per_node == 1


def test_all_values_beyond_the_job_are_refused_at_once_with_their_origins(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("nodes: 2\ngres: gpu:h100:4\n")
    overrides = ("policy.train_global_batch_size=32", "cluster.num_nodes=3", "cluster.gpus_per_node=8")
    overrides += ("env.name=math", "data.train.data_path=a.jsonl", "data.validation.data_path=b.jsonl")
    assert refusal(here, *overrides) == [
        f"cluster.num_nodes is 3 (command line: cluster.num_nodes=3) but the job has nodes 2 ({here}/slurmkit.yaml:1): "
        "leave cluster.num_nodes out, or make them equal",
        "cluster.gpus_per_node is 8 (command line: cluster.gpus_per_node=8) but the job asks for 4 per node (gres "
        f"gpu:h100:4, {here}/slurmkit.yaml:2): ask for as many (--gpus-per-node 8), or leave cluster.gpus_per_node out "
        "to train on what the job has",
        f"data.train.data_path: {here}/a.jsonl (command line: data.train.data_path=a.jsonl): no such file; a relative "
        f"path begins at {here}",
        f"data.validation.data_path: {here}/b.jsonl (command line: data.validation.data_path=b.jsonl): no such file; a "
        f"relative path begins at {here}",
    ]


def test_data_paths_of_all_sources_resolve_to_the_workdir_except_hub_names(here: Path) -> None:
    hub = "{data_path: openai/gsm8k, subset: main, split: train}"
    (here / "rows.jsonl").touch()
    sources = f"data.train=[{{data_path: rows.jsonl}},{hub}]"
    validation = "data.validation.data_path=rows.jsonl"
    job = settled(here, "env.name=math", sources, validation)
    assert job.train is not None
    paths = [source.data_path for source in job.train.data.sources.values()]
    assert paths == [f"{here}/rows.jsonl", "openai/gsm8k", f"{here}/rows.jsonl"]
    missing = sources.replace("rows", "gone").replace(", split: train", "").replace(", subset: main", "")
    assert [line.partition(" (")[0] for line in refusal(here, "env.name=math", missing, validation)] == [
        f"data.train.0.data_path: {here}/gone.jsonl",
        f"data.train.1.data_path: {here}/openai/gsm8k",
    ]


def test_what_a_rule_asks_of_nodes_and_gpus_is_asked_of_those_of_the_job(here: Path) -> None:
    apart = ("policy.generation.colocated.enabled=false", "policy.generation.colocated.resources.num_nodes=1")
    job = settled(here, *apart, "policy.dtensor_cfg.tensor_parallel_size=2", nodes=3, gres="gpu:2")
    assert job.train is not None
    assert (job.train.num_policy_nodes, job.train.num_ranks, job.train.num_data_parallel_ranks) == (2, 4, 2)
    assert (job.train.num_engine_nodes, job.train.engine_gpus_per_node, job.train.num_devices) == (1, 2, 6)
    (line,) = refusal(here, *apart, nodes=1, gres="gpu:2")
    assert line.startswith("policy.generation.colocated.enabled false needs policy.generation.colocated.resources.gpus")


def test_gpus_that_are_not_asked_for_are_refused_with_what_to_write(here: Path) -> None:
    (line,) = refusal(here, "cluster.gpus_per_node=8")
    assert "but the job asks for no GPU: ask for as many (--gpus-per-node 8)" in line


def test_gpus_that_nodes_cannot_share_evenly_are_refused(here: Path) -> None:
    (line,) = refusal(here, gpus="9", nodes=2)
    assert line.startswith("gpus 9 (command line: gpus) cannot be shared out evenly over nodes 2 (command line: nodes)")


def test_a_batch_too_small_for_all_ranks_names_every_place_that_says_so(here: Path) -> None:
    (line,) = refusal(here, nodes=4, gres="gpu:8")
    assert line.startswith("policy.train_global_batch_size 16 leaves some of the 32 data-parallel ranks without")
    assert line.endswith(
        f"(policy.train_global_batch_size: {here}/train.yaml:4; cluster.num_nodes: the job's nodes; "
        "cluster.gpus_per_node: the job's GPUs per node)"
    )


def test_a_batch_that_does_not_divide_names_every_place_that_says_so(here: Path) -> None:
    (line,) = refusal(here, "grpo.num_prompts_per_step=7")
    assert line.endswith(
        f"(policy.train_global_batch_size: {here}/train.yaml:4; grpo.num_prompts_per_step: command line: "
        f"grpo.num_prompts_per_step=7; grpo.num_generations_per_prompt: {here}/train.yaml:7)"
    )


def test_a_rule_inside_a_section_names_the_key_s_own_line(here: Path) -> None:
    line, other = refusal(here, "grpo.num_generations_per_prompt=1")
    assert other.startswith("policy.train_global_batch_size 16 must divide the 8 samples")
    assert line.endswith(" does without (command line: grpo.num_generations_per_prompt=1)")


def test_two_keys_of_a_job_that_exclude_each_other_are_both_placed(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("time: 10\n")
    with pytest.raises(UserError) as caught:
        settle(Request(command=("true",), flags={"time_min": "30"}), here)
    assert str(caught.value) == (
        f"time_min (30) is longer than time (10) (time_min: command line: time_min; time: {here}/slurmkit.yaml:1)"
    )


def test_a_removed_key_has_no_origin_any_more(here: Path) -> None:
    assert "policy.train_global_batch_size" in settled(here).config_origins
    job = settled(here, "~policy.train_global_batch_size", "grpo.num_prompts_per_step=128")
    assert "policy.train_global_batch_size" not in job.config_origins


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("policy", {"optimizer": {"kwargs": {"betas": [0.9, 1.0]}}}),
        ("policy", {"optimizer": {"kwargs": {"lr": float("inf")}}}),
        ("policy", {"optimizer": {"kwargs": {"eps": float("inf")}}}),
        ("policy", {"optimizer": {"kwargs": {"weight_decay": float("inf")}}}),
        ("policy", {"generation": {"temperature": float("inf")}}),
        ("policy", {"from_scratch": {"supervised_lr": float("nan")}}),
        ("grpo", {"seed": 2**64}),
        ("cluster", {"call_timeout_seconds": float("inf")}),
        ("cluster", {"placement_timeout_seconds": 1e12}),
        ("env", {"timeout_seconds": float("inf")}),
    ],
)
def test_numbers_that_torch_or_a_timer_would_reject_later_are_refused(
    tmp_path: Path, section: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=rf"{section}\."):
        tiny_config(tmp_path, **{section: values})


def test_a_save_that_is_judged_by_validation_needs_no_schedule_for_it(here: Path) -> None:
    # The trainer validates before such a save, so unlike NeMo RL's these two need not meet.
    config = here / "train.yaml"
    config.write_text(CONFIG)
    train = load_config(config, ["grpo.val_period=0", "grpo.val_at_end=false", "checkpointing.save_period=7"])
    assert train.checkpointing.metric_name == "val:accuracy"
