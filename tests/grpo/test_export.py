"""What `slurmkit export` writes opens elsewhere and says the same as the checkpoint; nothing is ever overwritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from slurmkit.errors import Failure
from slurmkit.grpo.export import export
from tests.support.driver import Run
from tests.support.requirements import SLURMKIT


def exported(*arguments: str | Path, here: Path) -> subprocess.CompletedProcess[str]:
    command = [SLURMKIT, "export", *map(str, arguments)]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)


def greedy(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    tokens: list[int] = model.generate(ids, do_sample=False, max_new_tokens=8)[0].tolist()
    return tokens


@pytest.fixture
def results(finished: Run, tmp_path: Path) -> Path:
    """A results folder with a run of two checkpoints, its links as they were."""
    run = tmp_path / "results" / "mine"
    (run / "attempts").mkdir(parents=True)
    for name in ("step_1", "step_8"):
        shutil.copytree(finished.folder / name, run / name)
    for name, target in (("latest", "step_8"), ("best", "step_1")):
        (run / name).symlink_to(target)
    return run.parent


def test_an_exported_model_opens_and_says_what_the_checkpoint_says(results: Path, tmp_path: Path) -> None:
    done = exported("mine", tmp_path / "model", here=tmp_path)  # by name; the best
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"exported {results}/mine/step_1 to {tmp_path}/model\n"
    assert greedy(tmp_path / "model") == greedy(results / "mine" / "step_1" / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id is not None
    assert (tmp_path / "model" / "chat_template.jinja").is_file()
    assert not list(tmp_path.glob(".*"))


def test_another_type_of_weights_is_a_matter_of_rounding(results: Path, tmp_path: Path) -> None:
    arguments = (results / "mine", tmp_path / "new" / "half", "--step", "latest", "--dtype", "bfloat16")
    assert exported(*arguments, here=tmp_path).returncode == 0
    half, whole = tmp_path / "new" / "half", results / "mine" / "step_8" / "model"
    old, new = (load_file(folder / "model.safetensors") for folder in (whole, half))
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], tensor.bfloat16()) for name, tensor in old.items())
    assert AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16
    weights = (half / "model.safetensors").stat().st_mode
    assert weights == (half / "config.json").stat().st_mode  # whoever may read the one may read the other


def test_a_model_in_several_files_keeps_its_index(finished: Run, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_1"
    shutil.copytree(finished.folder / "step_1", checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    (checkpoint / "model" / "model.safetensors").unlink()
    model.save_pretrained(checkpoint / "model", max_shard_size="50KB")
    (checkpoint / "manifest.json").write_text("{}")
    export(checkpoint, tmp_path / "half", dtype="float16")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float16).state_dict()
    assert all(torch.equal(opened[name], tensor.half()) for name, tensor in model.state_dict().items())
    assert f'"total_size": {sum(each.nbytes for each in opened.values())}' in (
        tmp_path / "half" / "model.safetensors.index.json"
    ).read_text().replace(".0", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("results/mine there", 2, "there: exists already; slurmkit export writes to a new folder only"),
        ("results/mine new --step 3", 2, "--step 3: no such checkpoint in .*; there are 1, 8 and latest"),
        ("results/mine new --step newest", 2, "--step newest: no such checkpoint"),
        ("results/mine/step_8 new --step 1", 2, "--step 1: .*step_8 is a checkpoint itself"),
        ("yours new", 2, "yours: no run of that name"),
        ("results/empty new", 2, "holds no checkpoint"),
        ("results/mine new --step 8", 1, "step_8 is damaged: model/config.json is not what was written"),
        ("results/mine new --dtype int4", 2, "'int4' is not one of"),
        ("results/mine /proc/new", 1, "/proc/new cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_one_message(
    results: Path, tmp_path: Path, arguments: str, code: int, message: str
) -> None:
    (tmp_path / "there").mkdir()
    (results / "empty" / "attempts").mkdir(parents=True)
    with (results / "mine" / "step_8" / "model" / "config.json").open("a") as file:
        file.write(" ")
    done = exported(*arguments.split(), here=tmp_path)
    assert done.returncode == code
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "there").iterdir())


def test_an_export_that_fails_leaves_nothing(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Failure, match=r"new cannot be written: .*No space left"):
        export(results / "mine", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
