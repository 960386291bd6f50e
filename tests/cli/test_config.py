"""`slurmkit config`: every settled value, and where it comes from."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.support.requirements import REPOSITORY, SLURMKIT


def config(here: Path, *arguments: str) -> str:
    environment = {**os.environ, "SLURMKIT_SITE": "", "XDG_CONFIG_HOME": str(here), "SLURMKIT_QOS": "high"}
    return subprocess.run(
        [SLURMKIT, "config", *arguments],
        cwd=here,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


def test_each_line_is_a_key_its_value_and_its_origin(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("partition: gpu\nenv:\n  A: it's\n")
    lines = [line.split("  # ") for line in config(here, "--nodes", "2").splitlines()]
    shown = {key.partition(": ")[0]: (key.partition(": ")[2].strip(), origin) for key, origin in lines}
    assert shown["nodes"] == ("2", "command line: nodes")
    assert shown["partition"] == ('"gpu"', f"{here}/slurmkit.yaml:1")
    assert shown["env.A"] == ('"it\'s"', f"{here}/slurmkit.yaml:3")
    assert shown["qos"] == ('"high"', "environment: SLURMKIT_QOS")
    assert shown["workdir"] == (f'"{here}"', "default")
    assert "account" not in shown, "what nobody asks for is left out"


def test_json_holds_all_keys_of_the_job_and_of_the_training_configuration(here: Path) -> None:
    example = REPOSITORY / "examples/grpo_arithmetic.yaml"
    found = json.loads(config(here, "--json", "--nodes", "2", "--config", str(example), "grpo.seed=7"))
    assert found["spec"]["nodes"] == 2
    assert found["spec"]["account"] is None
    assert found["origins"]["account"] == "default"
    assert found["config"]["grpo"]["seed"] == 7
    assert found["config_origins"]["grpo.seed"] == "command line: grpo.seed=7"
    assert found["config_origins"]["cluster.num_nodes"] != "default", "it follows from the job's nodes"
    assert found["config_origins"]["grpo.max_num_steps"].startswith(f"{example}:")
    assert found["sources"] == [str(example)]
