"""The seed's two runs as examples: all of them but the real weights."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from slurmkit.config.load import read_config
from slurmkit.config.schema import TrainConfig
from slurmkit.config.validate import validate
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Message
from slurmkit.errors import UserError
from slurmkit.job.render import render
from slurmkit.job.settle import Request, settle
from tests.support.requirements import REPOSITORY, need_shared_data

EXAMPLES = REPOSITORY / "examples"
DAPO, WORKPLACE = EXAMPLES / "grpo_dapo17k_qwen3_4b.yaml", EXAMPLES / "grpo_workplace_assistant.yaml"


@pytest.fixture
def dapo_files(tmp_path: Path) -> tuple[str, ...]:
    """Rows as DAPO-Math-17k and AIME have them, in Parquet and JSONL, and the overrides that name them."""
    problems = [json.loads(line) for line in need_shared_data("gsm8k/test.jsonl").read_text().splitlines()[:80]]
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": problem["question"]}],
            "ability": "MATH",
            "reward_model": {
                "ground_truth": problem["answer"].rpartition("#### ")[2],
                "style": "rule-lighteval/MATH_v2",
            },
            "extra_info": {"index": str(number)},
        }
        for number, problem in enumerate(problems)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:70]), tmp_path / "train.parquet")
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[70:]))
    return f"data.train.data_path={tmp_path}/train.parquet", f"data.validation.data_path={tmp_path}/val.jsonl"


@pytest.fixture
def workplace_files() -> tuple[str, ...]:
    path = need_shared_data("workplace_gym/example.jsonl")
    data = f"data.train.data_path={path}", f"data.validation.data_path={path}"
    return *data, f"env.workplace.databases={path.parent}"


def settled(config: Path, nodes: int, overrides: tuple[str, ...], here: Path) -> tuple[TrainConfig, str]:
    """The configuration that the job would train with, and the job."""
    flags = {"nodes": nodes, "gres": "gpu:8", "time": "4:00:00"}
    found = settle(Request(config=config, overrides=overrides, flags=flags), here)
    script = render(found.spec, found.templates)
    again = yaml.safe_load(found.spec.config or "")
    (here / "config.yaml").write_text(yaml.safe_dump(again))
    return validate(TrainConfig, read_config(here / "config.yaml", ())), script


def test_dapo_17k_on_eight_nodes_settles_renders_and_lays_out_its_ranks(
    dapo_files: tuple[str, ...], tmp_path: Path
) -> None:
    train, script = settled(DAPO, 8, dapo_files, tmp_path)
    assert "#SBATCH --nodes=8\n" in script
    assert "#SBATCH --gres=gpu:8\n" in script
    assert (train.num_ranks, train.ranks_per_node, train.num_data_parallel_ranks) == (64, 8, 32)
    assert train.policy.train_global_batch_size == 64 * 16
    assert train.policy.train_global_batch_size // train.num_data_parallel_ranks == 32, "sequences of a rank and update"
    assert train.policy.micro_batch_tokens == 32768


def test_the_workplace_example_renders_for_one_node_with_its_rank_layout(
    workplace_files: tuple[str, ...], tmp_path: Path
) -> None:
    train, script = settled(WORKPLACE, 1, workplace_files, tmp_path)
    assert "#SBATCH --nodes=1\n" in script
    assert (train.num_ranks, train.num_data_parallel_ranks) == (8, 8)
    assert train.policy.train_global_batch_size // train.num_data_parallel_ranks == 128
    assert train.policy.micro_batch_tokens == 8192


def test_rows_of_dapo_17k_are_the_example_s_tasks(dapo_files: tuple[str, ...], tmp_path: Path) -> None:
    train, _ = settled(DAPO, 8, dapo_files, tmp_path)
    domain = make_domain(train)
    assert (len(domain.train_tasks), len(domain.validation_tasks)) == (70, 10)
    task = domain.train_tasks[0]
    assert task.messages == (Message("user", task.question),)
    assert task.answer == "18"


def test_rows_of_nemo_gym_are_the_workplace_example_s_tasks(workplace_files: tuple[str, ...], tmp_path: Path) -> None:
    train, _ = settled(WORKPLACE, 1, workplace_files, tmp_path)
    domain = make_domain(train)
    assert len(domain.train_tasks) == len(domain.validation_tasks) == 5
    opened = asyncio.run(domain.environment().start(domain.train_tasks[0]))  # type: ignore[union-attr]
    assert [message.role for message in opened.messages] == ["system", "user"]
    assert len(opened.tools) == 27


# The values of NeMo RL's own files, commits 2311de495^ and 7ea279abf.
BOTH: dict[str, Any] = {
    "grpo.num_prompts_per_step": 64,
    "grpo.num_generations_per_prompt": 16,
    "grpo.max_num_epochs": 1,
    "grpo.max_num_steps": 1_000_000,
    "grpo.normalize_rewards": True,
    "grpo.use_leave_one_out_baseline": True,
    "grpo.val_period": 10,
    "grpo.val_at_start": True,
    "grpo.max_val_samples": None,
    "grpo.seed": 42,
    "loss_fn.reference_policy_kl_penalty": 0,
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.ratio_clip_max": 0.2,
    "loss_fn.token_level_loss": True,
    "checkpointing.metric_name": "val:accuracy",
    "checkpointing.keep_top_k": 3,
    "policy.train_global_batch_size": 1024,
    "policy.train_micro_batch_size": 1,
    "policy.precision": "bfloat16",
    "policy.max_grad_norm": 1.0,
    "policy.dtensor_cfg.activation_checkpointing": True,
    "policy.optimizer.kwargs.weight_decay": 0.01,
    "policy.generation.backend": "vllm",
    "policy.generation.temperature": 1.0,
    "policy.generation.colocated.enabled": True,
    "policy.generation.vllm_cfg.gpu_memory_utilization": 0.8,
    "policy.generation.vllm_cfg.tensor_parallel_size": 1,
    "logger.wandb_enabled": True,
    "cluster.gpus_per_node": 8,
}
OF_DAPO: dict[str, Any] = {
    "policy.model_name": "Qwen/Qwen3-4B-Instruct-2507",
    "policy.max_total_sequence_length": 32768,
    "policy.logprob_chunk_size": 1024,
    "policy.dtensor_cfg.tensor_parallel_size": 2,
    "policy.optimizer.kwargs.lr": 1e-6,
    "cluster.num_nodes": 8,
}
OF_WORKPLACE: dict[str, Any] = {
    "checkpointing.save_period": 6,
    "policy.model_name": "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
    "policy.max_total_sequence_length": 8192,
    "policy.optimizer.kwargs.lr": 5e-6,
    "policy.generation.vllm_kwargs.mamba_ssm_cache_dtype": "float32",
    "cluster.num_nodes": 1,
}


@pytest.mark.parametrize(("config", "own"), [(DAPO, OF_DAPO), (WORKPLACE, OF_WORKPLACE)], ids=["dapo", "workplace"])
def test_an_example_has_the_original_s_values(config: Path, own: dict[str, Any]) -> None:
    paths = ("data.train.data_path=a.jsonl", "data.validation.data_path=b.jsonl", "env.workplace.databases=c")
    train = validate(TrainConfig, read_config(config, paths))

    def value(key: str) -> Any:
        found: Any = train.model_dump()
        for name in key.split("."):
            found = found[name]
        return found

    original = BOTH | own
    assert {key: value(key) for key in original} == original


@pytest.mark.parametrize("config", [DAPO, WORKPLACE], ids=["dapo", "workplace"])
def test_an_example_without_its_data_says_which_key_is_missing(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.data_path"):
        settle(Request(config=config, flags={"gres": "gpu:8"}), tmp_path)
