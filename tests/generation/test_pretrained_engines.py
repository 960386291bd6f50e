"""A real pretrained model: engines and policy against transformers, with its tokenizer of 49,152 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slurmkit.envs.environment import Message
from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.grpo.causal_lm import whole_model
from slurmkit.grpo.policy_model import PolicyModel
from slurmkit.rollout.chat import Chat
from tests.support.engines import Torch, Vllm
from tests.support.requirements import need_smollm2

pytestmark = pytest.mark.model

Engine = Torch | Vllm
QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "12 + 30 = ?", "Sag etwas: é漢🙂")
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model_path() -> Path:
    return need_smollm2()


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[tuple[int, ...]]:
    chat = Chat(model_path)
    return [chat.prompt_ids([Message("user", question)]) for question in QUESTIONS]


@pytest.fixture(scope="module", params=[Torch, pytest.param(Vllm, marks=pytest.mark.vllm)])
def engine(model_path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = request.param(model_path, precision="float32", max_total_length=128, max_batch_size=16)
    yield engine
    engine.end()


@torch.inference_mode()
def logprobs(reference: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probability of each token after the first."""
    logits_TV = reference(input_ids=torch.tensor([ids])).logits[0].double() / temperature
    return logits_TV.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def assert_exact(reference: Any, tokenizer: Any, request: Request, completion: Completion) -> None:
    ids, temperature = [*request.prompt_ids, *completion.token_ids.tolist()], request.sampling.temperature or 1.0
    expected = logprobs(reference, ids, temperature)[len(request.prompt_ids) - 1 :]
    assert completion.logprobs == pytest.approx(expected.numpy(), abs=1e-4)
    assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_sampled_logprobs_equal_those_of_transformers(
    engine: Engine, reference: Any, tokenizer: Any, prompts: list[tuple[int, ...]]
) -> None:
    # Two requests of a prompt, as in a group: the prompt is computed once.
    requests = [
        Request(prompt, SamplingParams(temperature, NEW_TOKENS, seed))
        for prompt in prompts
        for seed, temperature in ((1, 1.0), (2, 0.7))
    ]
    completions = engine.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert_exact(reference, tokenizer, request, completion)
    assert len({completion.text for completion in completions}) == len(requests)


def test_greedy_replies_equal_those_of_transformers(
    engine: Engine, reference: Any, tokenizer: Any, prompts: list[tuple[int, ...]]
) -> None:
    requests = [Request(prompt, SamplingParams(0.0, NEW_TOKENS, 0)) for prompt in prompts]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        ids = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            said = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        assert completion.token_ids.tolist() == said[0, ids.shape[1] :].tolist()
        assert_exact(reference, tokenizer, request, completion)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with so many threads of torch, whose number changes how kernels round."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_policy_s_logprobs_of_packed_chats_equal_those_of_transformers(
    model_path: Path, reference: Any, prompts: list[tuple[int, ...]]
) -> None:
    model = PolicyModel(whole_model(model_path, trust_remote_code=False))
    assert model.packs
    ids_T = torch.tensor([token for prompt in prompts for token in prompt])
    positions_T = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    with torch.inference_mode():
        found_T, _ = model(ids_T, positions_T, tuple(map(len, prompts)), 1.0)
    for prompt, found in zip(prompts, found_T.split([len(prompt) for prompt in prompts]), strict=True):
        assert found[1:].numpy() == pytest.approx(logprobs(reference, list(prompt)).numpy(), abs=1e-4)


def test_an_engine_ends_a_reply_with_the_template_s_own_end(engine: Engine, tokenizer: Any, model_path: Path) -> None:
    shown = [Message("user", "2 + 2 = ?"), Message("assistant", "Answer: 4"), Message("user", "1 + 2 = ?")]
    prompt = Chat(model_path).prompt_ids(shown)
    (completion,) = engine.generate([Request(prompt, SamplingParams(0.0, NEW_TOKENS, 0))])
    assert completion.finish_reason == "stop"
    assert tokenizer.decode(completion.token_ids[-1:]) == "<|im_end|>"
    assert completion.text.startswith("Answer: ")
