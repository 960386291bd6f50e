"""The command lines of NeMo Gym's two pages on training with NeMo RL, token by token, on a tiny model.

The pages are training-tutorials/nemo-rl-grpo/{single,multi}-node-training of NVIDIA-NeMo/Gym 07d6b0d, and the second
one's launcher is NVIDIA-NeMo/RL 7ea279a, examples/nemo_gym/launch_nemo_gym_multinode_training.sh. The configuration is
examples/grpo_workplace_assistant.yaml under their file's name. Only the model and the counts are smaller.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.driver import Run
from tests.support.requirements import REPOSITORY, SLURMKIT

pytestmark = pytest.mark.ray

CONFIG = "examples/nemo_gym/grpo_workplace_assistant_nemotron_nano_v2_9b.yaml"
TINY = f"""\
defaults: {REPOSITORY}/examples/grpo_workplace_assistant.yaml
env: {{workplace: {{databases: null, world_seed: 0, max_turns: 2}}}}
data: {{train: {{data_path: tiny/train.jsonl}}, validation: {{data_path: tiny/val.jsonl}}}}
grpo: {{num_prompts_per_step: 2, num_generations_per_prompt: 2, max_rollout_turns: 2, max_val_samples: 2}}
policy:
  model_name: tiny/model
  max_total_sequence_length: 512
  precision: float32
  generation: {{backend: torch, max_new_tokens: 8, tool_parser: hermes}}
logger: {{wandb: {{mode: offline}}}}
cluster: {{gpus_per_node: 0}}
"""
PLUGIN = "nemotron_toolcall_parser_no_streaming.py"
SINGLE_NODE = f"""\
EXP_NAME="$(date +%Y%m%d)/nemo_gym_grpo/nemotron_nano_v2_9b/workplace_assistant_001"
mkdir -p results/$EXP_NAME
CONFIG_PATH={CONFIG}
slurmkit run \\
    --config=$CONFIG_PATH \\
    ++logger.wandb.project="$USER-nemo-gym-rl-integration" \\
    ++logger.wandb.name=$EXP_NAME \\
    ++logger.log_dir=results/$EXP_NAME \\
    ++policy.generation.vllm_cfg.tool_parser_plugin=$(find $PWD/.cache -name {PLUGIN}) \\
    ++grpo.max_num_steps=3 \\
    ++checkpointing.checkpoint_dir=results/$EXP_NAME &> results/$EXP_NAME/output.log
"""
MULTI_NODE = f"""\
set -- --config={CONFIG} \\
    ++policy.generation.vllm_cfg.tool_parser_plugin=$(find $PWD/.cache -name {PLUGIN}) \\
    logger.wandb.project="$USER-nemo-gym-rl-integration"
slurmkit submit --wait --nodes=$NUM_ACTOR_NODES --time=0:10:0 \\
    ++cluster.num_nodes=$NUM_ACTOR_NODES \\
    ++logger.wandb.name=$EXP_NAME \\
    ++logger.log_dir=results/$EXP_NAME \\
    ++checkpointing.checkpoint_dir=results/$EXP_NAME \\
    $@ grpo.max_num_steps=2
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks and a model of the Workplace Assistant."""
    spec = importlib.util.spec_from_file_location("tiny_workplace", REPOSITORY / "scripts/make_tiny_workplace.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    for name, size in {"TASKS": 12, "VALIDATION_TASKS": 4, "DEMONSTRATED": 20, "STEPS": 2}.items():
        setattr(script, name, size)
    script.main(folder := tmp_path_factory.mktemp("tiny") / "tiny")
    return folder


@pytest.fixture
def rl(tiny: Path) -> Iterator[Path]:
    """In place of NeMo RL's checkout: a shared folder, without a space, as the pages quote no path."""
    with tempfile.TemporaryDirectory(prefix="slurmkit-test-", dir="/var/tmp") as name:
        here = Path(name)
        shutil.copytree(tiny, here / "tiny")
        (here / CONFIG).parent.mkdir(parents=True)
        (here / CONFIG).write_text(TINY)
        (here / ".cache/hub").mkdir(parents=True)
        (here / ".cache/hub" / PLUGIN).touch()
        yield here


def bash(here: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{SLURMKIT.parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-eu", "-c", text],
        cwd=here,
        env={**os.environ, "USER": "me", "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_the_single_node_page_s_command_line_trains(rl: Path) -> None:
    done = bash(rl, SINGLE_NODE)
    [folder] = rl.glob("results/*/nemo_gym_grpo/nemotron_nano_v2_9b/workplace_assistant_001")
    assert done.returncode == 0, (folder / "output.log").read_text()
    assert [line["step"] for line in Run(0, "", "", folder).lines] == [0, 1, 2, 3]
    assert (folder / "step_3/manifest.json").is_file()
    assert not (folder / "metrics.jsonl").is_symlink(), "log_dir is the run directory itself"


def test_the_multi_node_page_s_command_line_trains(cluster: Cluster, rl: Path) -> None:
    name = "nemo_gym_grpo/nemotron_nano_v2_9b/2nodes/workplace_assistant_001"
    done = bash(rl, MULTI_NODE, EXP_NAME=name, NUM_ACTOR_NODES="2", SLURM_CONF=cluster.configuration)
    folder = rl / "results" / name
    log = folder / "attempts/latest/driver.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert [line["step"] for line in Run(0, "", "", folder).lines] == [0, 1, 2]


def test_logs_of_a_run_go_to_log_dir_and_are_found_from_the_run(rl: Path) -> None:
    words = f"--config={CONFIG} logger.log_dir=logs/run logger.tensorboard_enabled=true grpo.max_num_steps=1"
    done = bash(rl, f"slurmkit run {words} checkpointing.checkpoint_dir=results/run")
    assert done.returncode == 0, done.stdout + done.stderr
    run, logs = rl / "results/run", rl / "logs/run"
    names = {"metrics.jsonl", "plots", "samples", "validation", "wandb", "tensorboard"}
    assert {path.name for path in logs.iterdir()} == names
    assert {path.name for path in run.iterdir() if path.is_symlink()} - {"best"} == names | {"latest"}
    for pattern in ("plots/validation_reward.png", "wandb/offline-run-*/run-*.wandb", "tensorboard/*", "samples/*"):
        assert any(path.stat().st_size > 0 for path in logs.glob(pattern)), pattern
    assert "1/1" in bash(rl, "slurmkit status results/run").stdout
    assert bash(rl, "slurmkit report results/run").returncode == 0
    assert "val:accuracy" in (run / "report.html").read_text()
    other = bash(rl, f"slurmkit run {words} checkpointing.checkpoint_dir=results/other")
    assert other.returncode == 2
    assert f"{logs}: it holds metrics.jsonl of another run" in other.stdout, "the end of the driver's log"
    assert not (rl / "results/other/metrics.jsonl").exists()
