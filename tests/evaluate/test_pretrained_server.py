"""BFCL's server with a real pretrained model."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slurmkit.evaluate.bfcl import Settings
from slurmkit.evaluate.server import vllm_server
from tests.support.requirements import need_smollm2

pytestmark = [pytest.mark.vllm, pytest.mark.model]

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_bfcl_s_server_answers_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model, settings = need_smollm2(), Settings((), dtype="float32")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": "smollm2", "messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 12}
    arguments, log = settings.server_arguments, tmp_path / "server.log"
    with vllm_server(model, "smollm2", arguments, log, deadline_seconds=400) as server:
        headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.base_url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=200) as reply:
            answer = json.load(reply)["choices"][0]["message"]
        server.check()
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    said = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert answer["content"] == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert not answer.get("tool_calls")
