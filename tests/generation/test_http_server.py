"""The policy over HTTP: what an agent of another program is told, and what new weights do to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slurmkit.config.model import ServingChatKwargs, VllmCfg
from slurmkit.generation.engine import Request, SamplingParams
from slurmkit.generation.http_server import WEIGHT_VERSIONS, Serving, make_api_key
from slurmkit.generation.weights import Weights
from tests.support.engines import Vllm
from tests.support.tiny_model import make_tiny_model

MESSAGES = [{"role": "user", "content": "1+2="}]
# In place of the model's own.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{{ mood }}"
PLUGIN = """
from vllm.entrypoints.generate.base.protocol import ExtractedToolCallInformation, FunctionCall, ToolCall
from vllm.tool_parsers import ToolParser, ToolParserManager

@ToolParserManager.register_module(["always_look"])
class AlwaysLook(ToolParser):
    def extract_tool_calls(self, model_output, request):
        call = ToolCall(function=FunctionCall(name="look", arguments="{}"))
        return ExtractedToolCallInformation(tools_called=True, tool_calls=[call], content=None)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"max_length": 320, "num_attention_heads": 1, "num_key_value_heads": 1}
    return make_tiny_model(tmp_path_factory.mktemp("served") / "model", **shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "serving"
    make_api_key(folder)
    return folder


@pytest.fixture(scope="module")
def vllm(model: Path, folder: Path) -> Iterator[Vllm]:
    (plugin := folder.parent / "plugin.py").write_text(PLUGIN)
    chat = ServingChatKwargs(enable_auto_tools=True, tool_parser="always_look")
    own = VllmCfg(http_server_serving_chat_kwargs=chat, tool_parser_plugin=str(plugin))
    settings: dict[str, Any] = {"precision": "float32", "max_total_length": 320, "max_batch_size": 8, "settings": own}
    vllm = Vllm(model, **settings, serving=Serving(folder, "engine_0", TEMPLATE, {"mood": "gladly"}))
    vllm.do(vllm.engine.start())
    yield vllm
    vllm.end()


async def ask(folder: Path, path: str, body: dict[str, Any], key: str | None = None) -> tuple[int, Any, str]:
    told = json.loads((folder / "engine_0.json").read_text())
    headers = {"Authorization": f"Bearer {key or (folder / 'api_key').read_text().strip()}"}
    async with (
        aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(60)) as session,
        session.post(f"{told['base_url']}/{path}", json={"model": told["model"], **body}) as response,
    ):
        return response.status, await response.json(), response.headers.get(WEIGHT_VERSIONS, "")


@torch.inference_mode()
def full_forward(model: Path, prompt: list[int], token_ids: list[int]) -> list[float]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logprobs = torch.log_softmax(reference(input_ids=torch.tensor([[*prompt, *token_ids]])).logits[0], dim=-1)
    return [float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(token_ids)]


@pytest.mark.vllm
def test_a_response_includes_token_ids_and_logprobs_for_training(vllm: Vllm, folder: Path, model: Path) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "seed": 1, "logprobs": True, "return_token_ids": True}
    status, answer, versions = vllm.do(ask(folder, "chat/completions", body))
    assert (status, versions) == (200, "0,0"), answer
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert answer["prompt_token_ids"] == (prompt := tokenizer("1+2=gladly", add_special_tokens=False)["input_ids"])
    [choice] = answer["choices"]
    token_ids = choice["token_ids"]
    assert 0 < len(token_ids) <= 20
    # vLLM leaves out the beginning of a character that the limit cut.
    assert tokenizer.decode(token_ids, skip_special_tokens=True).startswith(choice["message"]["content"])
    assert choice["message"]["content"]
    logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
    assert logprobs == pytest.approx(full_forward(model, prompt, token_ids), abs=1e-5)


@pytest.mark.vllm
def test_requests_with_a_wrong_key_are_rejected_and_the_key_is_private(vllm: Vllm, folder: Path) -> None:
    for path in ("chat/completions", "../invocations", "../metrics"):
        status, answer, _ = vllm.do(ask(folder, path, {"messages": MESSAGES}, key="wrong"))
        assert (status, answer) == (401, {"error": "Unauthorized"})
    assert oct(folder.stat().st_mode)[-3:] == "700"
    assert oct((folder / "api_key").stat().st_mode)[-3:] == "600"


@pytest.mark.vllm
def test_a_weight_load_waits_for_running_requests_and_applies_to_the_next(
    vllm: Vllm, folder: Path, model: Path, tmp_path: Path
) -> None:
    shape = {"max_length": 320, "num_attention_heads": 1, "num_key_value_heads": 1}
    other = make_tiny_model(tmp_path / "other", seed=1, **shape)
    weights = Weights(5, AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict())
    body = {"prompt": [1, 2, 3], "max_tokens": 250, "seed": 3, "logprobs": 0, "return_token_ids": True}
    body |= {"ignore_eos": True}

    async def load_meanwhile() -> list[Any]:
        under_way = asyncio.ensure_future(ask(folder, "completions", body))
        await asyncio.sleep(0.1)
        assert not under_way.done()
        await vllm.engine.load(weights)
        after = ask(folder, "completions", {**body, "max_tokens": 5})
        return [await under_way, await after]

    before, after = vllm.do(load_meanwhile())
    for (status, answer, versions), sampled_by, told in ((before, model, "0,"), (after, other, "5,5")):
        assert status == 200, answer
        assert versions.startswith(told)
        [choice] = answer["choices"]
        expected = full_forward(sampled_by, [1, 2, 3], choice["token_ids"])
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-5)
    [own] = vllm.generate([Request((1, 2, 3), SamplingParams(1.0, 5, 0))])
    assert set(own.weight_versions) == {5}


@pytest.mark.vllm
def test_a_plugin_registers_a_tool_parser_with_vllm(vllm: Vllm, folder: Path) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    body = {"messages": MESSAGES, "tools": [tool], "max_tokens": 3}
    status, answer, _ = vllm.do(ask(folder, "chat/completions", body))
    assert status == 200, answer
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": "{}"}


def test_a_format_of_tool_calls_is_asked_for_where_tools_are() -> None:
    with pytest.raises(ValueError, match="enable_auto_tools true needs tool_parser, such as hermes"):
        ServingChatKwargs(enable_auto_tools=True)
