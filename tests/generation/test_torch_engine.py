"""The embedded engine against transformers itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.generation.torch_engine import TorchEngine
from slurmkit.generation.weights import Weights

EOS = 256
PROMPTS = [(3, 1, 4), (1, 5), (9, 2, 6, 5, 3, 5, 8), (9,), (7, 9, 3, 2)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture
def engine(model_path: Path) -> TorchEngine:
    return TorchEngine(str(model_path), precision="float32", max_total_length=64, max_batch_size=64)


def requests(count: int, temperature: float, max_new_tokens: int) -> list[Request]:
    return [
        Request(PROMPTS[i % len(PROMPTS)], SamplingParams(temperature, max_new_tokens, seed=i)) for i in range(count)
    ]


def tokens(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [tuple(completion.token_ids.tolist()) for completion in completions]


@torch.inference_mode()
def full_forward(reference: Any, prompt: tuple[int, ...], completion: Completion, temperature: float) -> Any:
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logprobs = torch.log_softmax(reference(input_ids=ids).logits[0].double() / temperature, dim=-1)
    return [float(logprobs[t - 1, ids[0, t]]) for t in range(len(prompt), ids.shape[1])]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_a_full_forward_at_the_sampling_temperature(
    engine: TorchEngine, reference: Any, temperature: float
) -> None:
    asked = requests(40, temperature, 30)
    for request, completion in zip(asked, engine.generate(asked), strict=True):
        expected = full_forward(reference, request.prompt_ids, completion, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_tokens_follow_from_the_seed_whoever_shares_the_batch(engine: TorchEngine) -> None:
    asked = requests(12, 1.0, 20)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked]
    backwards = engine.generate(asked[::-1])[::-1]
    assert tokens(together) == tokens(alone) == tokens(backwards)
    assert len(set(tokens(together))) == len(together)


def test_the_end_token_is_kept_and_nothing_follows_it(engine: TorchEngine) -> None:
    completions = engine.generate(requests(64, 1.0, 40))
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert stopped
    assert cut
    assert all(completion.token_ids.tolist().index(EOS) == len(completion.token_ids) - 1 for completion in stopped)
    assert all(EOS not in completion.token_ids and len(completion.token_ids) == 40 for completion in cut)


def test_the_text_is_what_the_tokens_say_without_those_that_say_nothing(engine: TorchEngine, model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    completions = engine.generate(requests(20, 1.0, 40))
    assert any(EOS in completion.token_ids for completion in completions)
    for completion in completions:
        said = [token for token in completion.token_ids.tolist() if token not in tokenizer.all_special_ids]
        assert completion.text == tokenizer.decode(said)


def test_temperature_zero_is_what_transformers_generates_greedily(engine: TorchEngine, reference: Any) -> None:
    for request, completion in zip(asked := requests(5, 0.0, 12), engine.generate(asked), strict=True):
        ids = torch.tensor([request.prompt_ids])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()


def test_tokens_are_drawn_as_often_as_the_model_says(engine: TorchEngine, reference: Any) -> None:
    asked = [Request(PROMPTS[0], SamplingParams(0.3, 1, seed=seed)) for seed in range(2000)]
    drawn = numpy.bincount([c.token_ids[0] for c in engine.generate(asked)], minlength=264) / len(asked)
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = torch.softmax(logits / 0.3, -1).numpy()
    deviation = numpy.sqrt(expected * (1 - expected) / len(asked))
    assert (abs(drawn - expected) < 5 * deviation + 1e-3).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, None), (1.0, 3), (0.8, 5), (1e-9, None), (0.99, 1000)])
def test_only_what_truncation_leaves_is_drawn_with_the_logprobs_of_what_is_left(
    engine: TorchEngine, reference: Any, top_p: float, top_k: int | None
) -> None:
    temperature = 0.3
    asked = [Request(PROMPTS[0], SamplingParams(temperature, 1, seed, top_p, top_k)) for seed in range(400)]
    # One that is not truncated, and one that is greedy, are as they were beside the others.
    free = Request(PROMPTS[0], SamplingParams(temperature, 1, 7))
    greedy = Request(PROMPTS[0], SamplingParams(0.0, 1, 7, top_p, top_k))
    *drawn, beside, greedily = engine.generate([*asked, free, greedy])
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    truth = torch.softmax(logits / temperature, -1)
    likeliest = truth.argsort(descending=True)[: top_k or len(truth)].tolist()
    mass, left = sum(float(truth[token]) for token in likeliest), list[int]()
    while not left or (sum(float(truth[token]) for token in left) < top_p * mass and len(left) < len(likeliest)):
        left.append(likeliest[len(left)])
    tokens_drawn = {int(each.token_ids[0]) for each in drawn}
    assert tokens_drawn <= set(left)
    assert len(tokens_drawn) >= min(len(left), 3)
    kept = sum(float(truth[token]) for token in left)
    for each in drawn:
        assert each.logprobs[0] == pytest.approx(float(torch.log(truth[each.token_ids[0]] / kept)), abs=1e-5)
    assert tokens([beside]) == tokens(engine.generate([free]))
    assert beside.logprobs == engine.generate([free])[0].logprobs
    assert tokens([greedily]) == [(int(logits.argmax()),)]
    assert greedily.logprobs[0] == pytest.approx(float(torch.log_softmax(logits, -1).max()), abs=1e-5)


def test_a_prompt_that_does_not_fit_is_a_finish_reason_and_the_others_are_answered(engine: TorchEngine) -> None:
    sampling = SamplingParams(1.0, 100, seed=1)
    long, edge, short = engine.generate(
        [Request((5,) * 64, sampling), Request((5,) * 63, sampling), Request((5,), sampling)]
    )
    assert (long.token_ids.tolist(), long.text, long.finish_reason) == ([], "", "prompt_too_long")
    assert len(edge.token_ids) == 1
    assert len(short.token_ids)


def test_loaded_weights_are_what_is_sampled_from(engine: TorchEngine, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "other", seed=5), dtype=torch.float32)
    engine.load(Weights(version=7, tensors=other.state_dict()))
    (request,) = requests(1, 1.0, 20)
    (completion,) = engine.generate([request])
    assert completion.weight_version == 7
    assert completion.logprobs == pytest.approx(full_forward(other, request.prompt_ids, completion, 1.0), abs=1e-5)


def test_weights_of_another_model_are_refused_by_name_before_any_is_copied(engine: TorchEngine, reference: Any) -> None:
    before = tokens(engine.generate(requests(3, 1.0, 10)))
    wrong = {name: torch.zeros_like(tensor) for name, tensor in reference.state_dict().items()}
    wrong["lm_head.weight"] = torch.zeros(8, 8)
    del wrong["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lm_head.weight is \(8, 8\), the engine holds \(264, 32\); model.norm"):
        engine.load(Weights(1, wrong))
    assert tokens(engine.generate(requests(3, 1.0, 10))) == before
