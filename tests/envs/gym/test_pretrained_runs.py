"""A real pretrained model in a run with tools and several turns, and its export."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.driver import Run, run
from tests.support.gym_server import TOOLS, gym_server, lines
from tests.support.requirements import SLURMKIT, need_smollm2

pytestmark = [pytest.mark.ray, pytest.mark.model]

# SmolLM2's own template, with the tools in the system message.
TEMPLATE = (
    "<|im_start|>system\n{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call(number: int) -> str:
    return f'<tool_call>{{"name": "add", "arguments": {{"number": {number}}}}}</tool_call>'


def row(expected: int) -> dict[str, Any]:
    """A row whose messages show one call, so that the model imitates the form."""
    said = [("user", "Add 3."), ("assistant", call(3)), ("user", f"Add {expected}.")]
    shown = [{"role": role, "content": content} for role, content in said]
    return {"id": expected, "responses_create_params": {"input": shown, "tools": TOOLS[:1]}, "expected": expected}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of a chat task with a tool."""
    model, folder = need_smollm2(), tmp_path_factory.mktemp("pretrained")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "rows.jsonl").write_text(lines([row(expected) for expected in (4, 5, 6, 7)]))
    with gym_server() as server:
        keys: dict[str, Any] = {
            "env": {"name": "gym", "gym": {"url": server.url}},
            "data": {name: {"data_path": str(folder / "rows.jsonl")} for name in ("train", "validation")},
            "policy": {
                "model_name": str(model),
                "tokenizer": {"chat_template": str(folder / "template.jinja")},
                "max_total_sequence_length": 192,
                "precision": "float32",
                "train_global_batch_size": 8,
                "optimizer": {"kwargs": {"lr": 1e-5}},
                "generation": {"max_new_tokens": 32, "tool_parser": "hermes"},
            },
            "grpo": {
                "num_prompts_per_step": 2,
                "num_generations_per_prompt": 4,
                "max_num_steps": 2,
                "max_rollout_turns": 2,
                "max_steps_without_signal": None,
                "val_at_end": False,
                "seed": 1,
            },
            "checkpointing": {"save_period": 2, "metric_name": "train:reward_mean"},
            "cluster": {"gpus_per_node": 0},
        }
        config = folder / "config.yaml"
        config.write_text(json.dumps(keys))  # JSON is YAML
        done = run(folder / "run", config, timeout=550)
    assert done.code == 0, done.output + done.errors
    return done


@pytest.mark.nightly
def test_a_real_model_calls_tools_and_is_trained_with_exact_logprobs(trained: Run) -> None:
    assert len(trained.lines) == 2
    assert min(trained.values("train:tool_calls_mean")) > 0
    assert max(trained.values("train:turns_mean")) > 1
    assert max(trained.values("train:broken_episodes")) == 0
    assert max(trained.values("train:grad_norm")) > 0.01
    # The engine's logprobs of all turns equal the policy's, also with the weights of the first update.
    assert max(trained.values("train:token_mult_prob_error")) < 1 + 1e-3


@pytest.mark.nightly
def test_an_exported_real_model_opens_in_transformers(trained: Run, tmp_path: Path) -> None:
    command = [SLURMKIT, "export", trained.folder, tmp_path / "model", "--step", "latest", "--dtype", "bfloat16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    source, model = need_smollm2(), AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "model"))
    assert before.keys() == after.keys()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == {
        name: (torch.bfloat16, tensor.shape) for name, tensor in before.items()
    }
    assert any(not torch.equal(after[name], before[name]) for name in before)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "model"))
    text = "a  12 + 34\n\n<|im_start|>é漢🙂"
    assert new(text)["input_ids"] == old(text)["input_ids"]
    assert new.chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == old.eos_token_id
    ids = torch.tensor([new("2 + 2 =")["input_ids"]])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).shape[1] > 4
