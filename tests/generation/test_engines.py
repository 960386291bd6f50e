"""Both engines against transformers itself: the same tests, the same model, whose embeddings are tied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slurmkit.generation.engine import Completion, Request, SamplingParams
from slurmkit.generation.shared_tensors import SharedTensors, lay_out, read
from slurmkit.generation.weights import SharedWeights, Weights, digest
from tests.support.engines import Torch, Vllm
from tests.support.tiny_model import make_tiny_model

Engine = Torch | Vllm
MAX_TOTAL_LENGTH = 320
EOS = 256
FOLDERS_END = 99
PROMPTS = [(3, 1, 4), (1, 5), (9, 2, 6, 5, 3, 5, 8), (9,), (7, 9, 3, 2)]


def make_tied_model(folder: Path, *, seed: int = 0) -> Path:
    """Wide enough for vLLM's kernels; with embeddings that are input and output, as small models have them.

    With as many tokens as vLLM's kernel for the head wants, some of which say nothing.
    """
    path = make_tiny_model(folder, seed=seed, max_length=MAX_TOTAL_LENGTH, num_attention_heads=1, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, tie_word_embeddings=True)
    model.resize_token_embeddings(288, mean_resizing=False)
    model.tie_weights()
    # What the folder says of ends is nobody's but where a minimum length forbids them.
    model.generation_config.eos_token_id = [EOS, FOLDERS_END]
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tied_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def reference(model_path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.fixture(scope="module", params=[Torch, pytest.param(Vllm, marks=pytest.mark.vllm)])
def engine(model_path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = request.param(model_path, precision="float32", max_total_length=MAX_TOTAL_LENGTH, max_batch_size=64)
    yield engine
    engine.end()


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
    engine: Engine, reference: Any, temperature: float
) -> None:
    asked = requests(40, temperature, 30)
    for request, completion in zip(asked, engine.generate(asked), strict=True):
        expected = full_forward(reference, request.prompt_ids, completion, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_tokens_follow_from_the_seed_whoever_shares_the_batch(engine: Engine) -> None:
    asked = requests(12, 1.0, 20)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked]
    backwards = engine.generate(asked[::-1])[::-1]
    assert tokens(together) == tokens(alone) == tokens(backwards)
    assert len(set(tokens(together))) == len(together)


def test_prompts_that_together_are_more_than_a_batch_are_answered_as_alone(engine: Engine) -> None:
    asked = [Request((*range(250), number), SamplingParams(1.0, 10, seed=number)) for number in range(40)]
    together = engine.generate(asked)
    assert tokens(together[::13]) == [tokens(engine.generate([request]))[0] for request in asked[::13]]


def test_the_end_token_is_kept_and_nothing_follows_it(engine: Engine) -> None:
    completions = engine.generate(requests(64, 1.0, 40))
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert stopped
    assert cut
    assert all(completion.token_ids.tolist().index(EOS) == len(completion.token_ids) - 1 for completion in stopped)
    assert all(EOS not in completion.token_ids and len(completion.token_ids) == 40 for completion in cut)


def test_a_stop_token_ends_a_completion_as_the_end_token_does_and_is_kept(engine: Engine, reference: Any) -> None:
    free = requests(40, 1.0, 30)
    stops = (7, 40, 41, 250)
    asked = [replace(each, sampling=replace(each.sampling, stop_token_ids=stops)) for each in free]
    for without, completion in zip(engine.generate(free), engine.generate(asked), strict=True):
        whole = without.token_ids.tolist()
        end = next((place for place, token in enumerate(whole) if token in stops), None)
        expected = (whole, without.finish_reason) if end is None else (whole[: end + 1], "stop")
        assert (completion.token_ids.tolist(), completion.finish_reason) == expected
    reasons = [completion.finish_reason for completion in engine.generate(asked)]
    assert {"stop", "length"} == set(reasons)


def test_no_stop_token_is_drawn_before_min_new_tokens_and_logprobs_match(engine: Engine, reference: Any) -> None:
    # Every other token, so that one of them is sure to come as soon as it may.
    stops, least = tuple(range(0, EOS, 2)), 6
    ends = torch.tensor([*stops, EOS, FOLDERS_END])
    asked = [
        Request(PROMPTS[i % 5], SamplingParams(1.0, 40, i, stop_token_ids=stops, min_new_tokens=least))
        for i in range(20)
    ]
    for request, completion in zip(asked, engine.generate(asked), strict=True):
        drawn = completion.token_ids.tolist()
        assert len(drawn) > least
        assert not {*drawn[:least]} & {*ends.tolist()}
        assert (drawn[-1] in {*stops, EOS}, completion.finish_reason) == (True, "stop")
        with torch.inference_mode():
            ids = torch.tensor([[*request.prompt_ids, *drawn]])
            logits = reference(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
            logits[:least, ends] = -torch.inf
        expected = torch.log_softmax(logits, -1).gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.numpy(), abs=1e-5)
    (cut,) = engine.generate([Request((1,), SamplingParams(1.0, 3, 0, stop_token_ids=stops, min_new_tokens=9))])
    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")


def test_the_text_is_what_the_tokens_say_without_those_that_say_nothing(engine: Engine, model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    completions = engine.generate(requests(20, 1.0, 40))
    assert any(EOS in completion.token_ids for completion in completions)
    for completion in completions:
        said = [token for token in completion.token_ids.tolist() if token not in tokenizer.all_special_ids]
        assert completion.text == tokenizer.decode(said)


def test_temperature_zero_is_what_transformers_generates_greedily(engine: Engine, reference: Any) -> None:
    for request, completion in zip(asked := requests(5, 0.0, 12), engine.generate(asked), strict=True):
        ids = torch.tensor([request.prompt_ids])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()


def test_tokens_are_drawn_as_often_as_the_model_says(engine: Engine, reference: Any) -> None:
    asked = [Request(PROMPTS[0], SamplingParams(0.3, 1, seed=seed)) for seed in range(2000)]
    drawn = numpy.bincount([c.token_ids[0] for c in engine.generate(asked)], minlength=288) / len(asked)
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = torch.softmax(logits / 0.3, -1).numpy()
    deviation = numpy.sqrt(expected * (1 - expected) / len(asked))
    assert (abs(drawn - expected) < 5 * deviation + 1e-3).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, None), (1.0, 3), (0.8, 5), (1e-9, None), (0.99, 1000)])
def test_truncated_sampling_draws_only_kept_tokens_with_their_logprobs(
    engine: Engine, reference: Any, top_p: float, top_k: int | None
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
    assert beside.logprobs == pytest.approx(engine.generate([free])[0].logprobs, abs=1e-6)
    assert tokens([greedily]) == [(int(logits.argmax()),)]
    assert greedily.logprobs[0] == pytest.approx(float(torch.log_softmax(logits, -1).max()), abs=1e-5)


def test_aborting_an_unsampled_request_leaves_other_completions_unchanged(engine: Engine) -> None:
    asked = requests(3, 1.0, 20)
    assert tokens(engine.generate_but(1, asked)) == tokens(engine.generate([asked[0], asked[2]]))


def test_a_too_long_prompt_gets_a_finish_reason_and_others_complete(engine: Engine) -> None:
    sampling = SamplingParams(1.0, 500, seed=1)
    lengths = (MAX_TOTAL_LENGTH, MAX_TOTAL_LENGTH - 1, 1)
    long, edge, short = engine.generate([Request((5,) * length, sampling) for length in lengths])
    assert (long.token_ids.tolist(), long.text, long.finish_reason) == ([], "", "prompt_too_long")
    assert len(edge.token_ids) == 1
    assert len(short.token_ids)


@pytest.fixture
def other(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_tied_model(tmp_path / "other", seed=5), dtype=torch.float32)


def test_engine_samples_from_loaded_weights_despite_its_prefix_cache(
    engine: Engine, reference: Any, other: Any
) -> None:
    # Longer than a block of the KV cache, which an engine keeps for the next prompt that begins alike.
    request = Request(tuple(range(200)), SamplingParams(1.0, 20, seed=1))
    shared = SharedTensors()
    for version, model in ((7, other), (8, reference), (9, other), (10, reference)):
        state = model.state_dict()
        told = digest(state) if version < 9 else None
        if version % 2:
            engine.load(Weights(version, state, told))
        else:
            engine.load(SharedWeights(version, shared.path, shared.write(state), told))
        for completion in engine.generate([request, request]):
            assert set(completion.weight_versions) == {version}
            expected = full_forward(model, request.prompt_ids, completion, 1.0)
            assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_weights_of_another_model_are_refused_by_name_before_any_is_copied(engine: Engine, reference: Any) -> None:
    before = tokens(engine.generate(requests(3, 1.0, 10)))
    wrong = {name: torch.zeros_like(tensor) for name, tensor in reference.state_dict().items()}
    wrong["lm_head.weight"] = torch.zeros(8, 8)
    del wrong["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lm_head.weight is \(8, 8\), the engine holds \(288, 32\); model.norm"):
        engine.load(Weights(1, wrong))
    assert tokens(engine.generate(requests(3, 1.0, 10))) == before


def test_weights_that_changed_on_the_way_are_refused(engine: Engine, reference: Any, other: Any) -> None:
    with pytest.raises(ValueError, match=r"the weights of version 3 changed on the way: SHA-256 \w+ was sent, \w+ arr"):
        engine.load(Weights(3, other.state_dict(), digest(reference.state_dict())))
    engine.load(Weights(4, reference.state_dict()))


def test_shared_memory_keeps_tensors_as_they_are_or_casts_them() -> None:
    shared = SharedTensors()
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.randn(7, dtype=torch.bfloat16)}
    whole = dict(read(shared.path, shared.write(tensors)))
    assert all(
        torch.equal(whole[name], tensor) and whole[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    shared.fill(table := lay_out(tensors, torch.bfloat16), tensors.items())
    halved = dict(read(shared.path, table))
    assert [tensor.dtype for tensor in halved.values()] == [torch.bfloat16, torch.int64, torch.bfloat16]
    assert torch.equal(halved["a"], tensors["a"].bfloat16())
    larger = {"d": torch.randn(1000, 100)}
    assert torch.equal(dict(read(shared.path, shared.write(larger)))["d"], larger["d"])


def test_numbers_of_any_type_have_the_digest_of_their_bytes() -> None:
    numbers = {"b": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T, "a": torch.ones(1)}
    assert digest(numbers) == digest(dict(reversed(numbers.items())))
    assert digest(numbers) != digest({**numbers, "a": torch.zeros(1)})


def test_the_torch_engine_computes_a_shared_prompt_once(model_path: Path) -> None:
    engine = Torch(model_path, precision="float32", max_total_length=MAX_TOTAL_LENGTH, max_batch_size=64)
    rows = list[int]()
    engine._engine._model.register_forward_pre_hook(
        lambda model, arguments, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    asked = [Request(prompt, SamplingParams(1.0, 4, seed)) for seed in range(8) for prompt in PROMPTS[:2]]
    alone = [engine.generate([request])[0] for request in asked]
    rows.clear()
    together = engine.generate(asked)
    assert rows[0] == 2
    assert tokens(together) == tokens(alone)
