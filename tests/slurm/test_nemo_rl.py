"""NeMo RL's own trainer through our bring-up: the run file of the examples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from slurmkit.job.render import render
from slurmkit.job.settle import Request, settle
from tests.support.cluster import Cluster
from tests.support.requirements import REPOSITORY

RUN_FILE = REPOSITORY / "examples/nemo_rl_workplace_assistant.yaml"
SECRETS = {"HF_TOKEN": "hf-canary", "WANDB_API_KEY": "wandb-canary"}


def test_the_run_file_renders_for_its_container_without_a_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (SECRETS | {"NEMO_RL": "/shared/RL", "NEMO_RL_IMAGE": "/images/nemo-rl.sqsh"}).items():
        monkeypatch.setenv(name, value)
    found = settle(Request(run_file=RUN_FILE, flags={"nodes": 2}), tmp_path)
    script = render(found.spec, found.templates)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gres=gpu:8",
        "#SBATCH --chdir=/shared/RL",
        "sk_container=(--container-image=/images/nemo-rl.sqsh ",
    ):
        assert f"\n{line}" in script
    assert "canary" not in script
    assert "for sk_name in HF_TOKEN WANDB_API_KEY; do" in script


def test_uv_gets_nemo_rl_s_own_command_once_with_the_address_of_our_ray(cluster: Cluster, shared_path: Path) -> None:
    folder = shared_path / "bin"
    folder.mkdir()
    # In place of uv: what it was asked for, and whether a Ray answers at the address it was given.
    (folder / "uv").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" >>arguments\n'
        'printf "%s\\n" "$RAY_ADDRESS" "$PWD" "$HF_HOME" "${#HF_TOKEN} ${#WANDB_API_KEY}" >environment\n'
        "python -c 'import ray; ray.init(address=\"auto\", log_to_driver=False); print(len(ray.nodes()))' >nodes\n"
    )
    (folder / "uv").chmod(0o755)
    # All of the run file but the container, which the test's nodes do not have.
    job = yaml.safe_load(RUN_FILE.read_text())
    del job["container"], job["python"]
    job["time"] = "0:05:00"
    job["setup"] = [f"export PATH='{folder}':$PATH"]
    (shared_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = cluster.slurmkit(
        shared_path, "submit", "--wait", "job.yaml", timeout=120, ray=True, NEMO_RL=str(shared_path), **SECRETS
    )
    log = shared_path / "results/nemo-rl-workplace-assistant/attempts/latest/driver.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    name = "nemo-rl-workplace-assistant"
    assert (shared_path / "arguments").read_text().splitlines() == [
        *("run", "python", "examples/nemo_gym/run_grpo_nemo_gym.py"),
        *("--config", "examples/nemo_gym/grpo_workplace_assistant_nemotron_nano_v2_9b.yaml"),
        "++cluster.num_nodes=1",
        f"++logger.wandb.name={name}",
        f"++logger.log_dir=results/{name}/nemo-rl/logs",
        f"++checkpointing.checkpoint_dir=results/{name}/nemo-rl/checkpoints",
    ]
    address, here, cache, lengths = (shared_path / "environment").read_text().splitlines()
    assert address.rpartition(":")[2].isdigit()
    assert (here, cache) == (str(shared_path), os.path.join(shared_path, ".cache"))
    assert lengths == f"{len(SECRETS['HF_TOKEN'])} {len(SECRETS['WANDB_API_KEY'])}"
    assert (shared_path / "nodes").read_text() == "1\n"
