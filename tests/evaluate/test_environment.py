"""slurmkit evaluate env: the run's own validation again, beside a baseline, and what is made of its episodes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from slurmkit.evaluate.environment import compared
from tests.support.driver import Run
from tests.support.groups import group, of
from tests.support.requirements import SLURMKIT
from tests.support.tiny_model import make_tiny_model, tiny_config


def evaluate(here: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [SLURMKIT, "evaluate", *arguments]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=400)


def test_a_checkpoint_repeats_its_run_accuracy_and_saves_the_comparison(finished: Run, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    for name in ("step_1", "step_8"):
        shutil.copytree(finished.folder / name, run / name)
    baseline = make_tiny_model(tmp_path / "base", max_length=32)
    done = evaluate(tmp_path, "env", run / "step_8", "--baseline", baseline, "--json", "--name", "first")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((run / "evaluate" / "first.json").read_text()) == result
    assert [path.name for path in (run / "evaluate").iterdir()] == ["first.json"]
    ours, theirs, apart = (result["figures"][side] for side in ("checkpoint", "baseline", "difference"))
    [measured] = [line["val:accuracy"] for line in finished.lines if line["step"] == 8]
    assert ours["accuracy"]["mean"] == pytest.approx(measured)
    assert (ours["tasks"], theirs["broken_episodes"]) == (8, 0)
    assert ours["accuracy"]["low"] <= measured <= ours["accuracy"]["high"]
    assert apart["accuracy"]["mean"] == pytest.approx(measured - theirs["accuracy"]["mean"])
    assert result["models"]["checkpoint"] == result["models"]["checkpoint"] | {"name": "mine/step_8"}
    assert len(result["tasks"]) == 8

    taken = evaluate(tmp_path, "env", run, "--name", "first")
    assert (taken.returncode, taken.stdout) == (2, "")
    assert "--name first: " in taken.stderr
    assert "first.json is there already" in taken.stderr


def test_each_task_counts_once_and_is_left_out_if_all_its_episodes_broke(tmp_path: Path) -> None:
    of_step = {"num_prompts_per_step": 2, "num_generations_per_prompt": 2}
    config = tiny_config(tmp_path, grpo={**of_step, "val_num_generations_per_prompt": 4})
    ours = [group(1, 1, 1, 1), group(1, 0, broken=["x", "x"]), of(broken=["x"] * 4), group(0, 0, 0, 0)]
    ours.append(group(1, 1, 1, 1))
    theirs = [group(0, 0, 0, 0), group(1, 1, 1, 1), group(1, 1, 1, 1), group(1, 1, 0, 0)]
    theirs.append(of(broken=["x"] * 4))
    result = compared({"checkpoint": ours, "baseline": theirs}, config)
    figures = result["figures"]
    assert figures["checkpoint"]["accuracy"]["mean"] == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert figures["checkpoint"] == figures["checkpoint"] | {"tasks": 4, "broken_episodes": 6}
    assert figures["baseline"]["accuracy"]["mean"] == pytest.approx((0 + 1 + 1 + 1 / 2) / 4)
    # Of the three that both have.
    assert figures["difference"]["accuracy"]["mean"] == pytest.approx((1 - 1 / 2 - 1 / 2) / 3)
    assert figures["checkpoint"]["pass@4"]["mean"] == pytest.approx((1 + 0 + 1) / 3)  # of those that have so many
    assert figures["checkpoint"]["pass@2"]["mean"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert result["tasks"][2]["checkpoint"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("env plain", "plain: no checkpoint: it must be a run directory with a step_N/, a step_N/ itself, or a model"),
        ("env nothing", "nothing: no run of that name"),
        ("env model", "model: is from no run, so give the configuration with --config FILE"),
        ("env model --step 3", "--step 3: .*model is a model's folder, without steps"),
        ("env model --config c.yaml --name ../x", r"--name \.\./x: should be letters, digits"),
        ("env model --config c.yaml grpo.sed=1", r"grpo\.sed"),
        ("env model b --config c.yaml", "'b' is no key=value"),
        ("env model --config c.yaml --baseline plain", "plain: no checkpoint"),
        ("bfcl model --categories simpel_python", "--categories simpel_python: .* the nearest is simple_python"),
        ("bfcl model --bfcl-python /bin/false", "--bfcl-python /bin/false: it cannot import bfcl_eval"),
        ("bfcl model --bfcl-python /no/python", "--bfcl-python /no/python: No such file"),
        ("bfcl model --vllm-args '\"'", "--vllm-args"),
        ("bfcl model --nemo-evaluator --baseline model", "--nemo-evaluator evaluates one model"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message_and_leaves_nothing(
    tmp_path: Path, arguments: str, message: str
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "c.yaml").write_text("env: {name: arithmetic}\npolicy: {from_scratch: {}}\n")
    done = evaluate(tmp_path, *shlex.split(arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "model", "plain"]
