"""What scripts/make_tiny_workplace.py makes for the example of the same name, with a model that is hardly trained."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from slurmkit.config.load import load_config
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Message
from slurmkit.envs.workplace.company import make_world
from slurmkit.envs.workplace.families import Draft
from slurmkit.envs.workplace.generate import drafts
from slurmkit.envs.workplace.scoring import end_state, same
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.tool_calls import read_calls
from tests.support.requirements import REPOSITORY

SIZES = {"TASKS": 30, "VALIDATION_TASKS": 12, "DEMONSTRATED": 60, "STEPS": 2}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("tiny_workplace", REPOSITORY / "scripts/make_tiny_workplace.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SIZES.items():
            patch.setattr(module, name, size)
        yield module


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """The questions of what the model was trained on before."""
    return []


@pytest.fixture(scope="module")
def folder(script: ModuleType, shown: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    conversation, train = script.conversation, script.train

    def note(draft: Draft, *rest: Any, **more: Any) -> Any:
        shown.append(draft.question)
        return conversation(draft, *rest, **more)

    def train_and_stop_noting(*arguments: Any) -> None:
        train(*arguments)
        script.conversation = conversation

    script.conversation, script.train = note, train_and_stop_noting
    script.main(folder := tmp_path_factory.mktemp("tiny workplace"))
    return folder


def test_no_task_is_validated_on_and_trained_on_or_shown(folder: Path, shown: list[str]) -> None:
    asked = {
        name: [
            json.loads(line)["responses_create_params"]["input"][0]["content"]
            for line in (folder / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "val")
    }
    assert [len(asked[name]) for name in ("val", "train")] == [12, 30]
    assert len(shown) == 60
    assert len({*asked["train"], *asked["val"], *shown}) == 12 + 30 + 60


def test_a_demonstration_has_the_tokens_of_an_episode_and_parsable_calls(script: ModuleType, folder: Path) -> None:
    data = (f"data.train.data_path={folder}/train.jsonl", f"data.validation.data_path={folder}/val.jsonl")
    config = load_config(REPOSITORY / "examples/grpo_workplace_tiny.yaml", (*data, f"policy.model_name={folder}/model"))
    chat, world = Chat.of(folder / "model", config.policy), make_world(0)
    domain = make_domain(config)
    _, draft = next(drafts(world, script.FAMILIES, script.SEED))
    opened = asyncio.run(domain.environment().start(domain.validation_tasks[0]))
    ids, mask = script.conversation(draft, world, Random(0), chat._tokenizer, right=1.0)
    prompt = chat.prompt(opened).ids
    assert tuple(ids[: len(prompt)]) == prompt
    assert mask[: len(prompt) + 1] == [0] * len(prompt) + [1]
    said = [Message("assistant", script.said(each)) for each in draft.calls]
    reading = read_calls(said[0].content, "hermes", [draft.calls[0][0]], first=0)
    assert [(call.name, call.arguments) for call in reading.tool_calls] == [draft.calls[0]]
    answer = Message("tool", "found", tool_call_id="call_0")
    written = chat.prompt_ids([Message("user", draft.question), said[0], answer])
    assert chat._tokenizer.decode(written).endswith(f"{said[0].content}<|end|><|tool|>found<|end|><|assistant|>")
    assert max(ids) < AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size


def test_a_mistake_changes_the_outcome_unless_it_happens_to_be_right(script: ModuleType) -> None:
    world, rng = make_world(0), Random(0)
    found = [draft for _, draft in islice(drafts(world, script.FAMILIES, script.SEED), 60)]
    right = [
        same(end_state(world, draft.calls), end_state(world, script.spoiled(draft.calls, rng)), "gym")
        for draft in found
    ]
    assert sum(right) < 0.2 * len(found)
