"""What a step trained on, token by token, in a file that people can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from slurmkit.envs.environment import Message
from slurmkit.errors import Failure
from slurmkit.grpo.sample_files import write_samples
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.episode import Episode
from slurmkit.rollout.sample import Sample
from tests.support.groups import episode
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(make_tiny_model(tmp_path_factory.mktemp("model")))


def sample(chat: Chat, rollout_id: int, advantage: float) -> Sample:
    prompt, reply = chat.prompt_ids([Message("user", "3+4=")]), chat.reply_ids("7")
    loss_mask = numpy.array([False] * len(prompt) + [True] * len(reply))
    return Sample(
        token_ids=numpy.array([*prompt, *reply], numpy.int32),
        loss_mask=loss_mask,
        logprobs=numpy.array([0.0] * len(prompt) + [-0.123456, -0.5], numpy.float32),
        advantage=loss_mask * numpy.float32(advantage),
        group_id=rollout_id // 3,
        rollout_id=rollout_id,
        temperature=1.0,
        weight_version=5,
        finish_reason="length",
    )


def written(folder: Path, samples: list[Sample], episodes: list[Episode], chat: Chat, count: int) -> list[Any]:
    write_samples(folder, 3, samples, dict(enumerate(episodes)), chat, count)
    return [json.loads(line) for line in (folder / "samples/step_3.jsonl").read_text().splitlines()]


def test_a_line_says_of_every_token_whether_it_is_trained_on_and_with_what(tmp_path: Path, chat: Chat) -> None:
    (line,) = written(tmp_path, [sample(chat, 0, 1.5)], [episode(0.25, name="sum")], chat, 4)
    assert {key: line[key] for key in ("task", "group", "reward", "correct")} == {
        "task": "sum",
        "group": 0,
        "reward": 0.25,
        "correct": True,
    }
    (told,) = line["samples"]
    assert "".join(told["tokens"]) == "<|user|>3+4=<|end|><|assistant|>7<|end|>"
    trained = [token for token, mask in zip(told["tokens"], told["mask"], strict=True) if mask]
    assert trained == ["7", "<|end|>"]
    assert told["logprobs"][-2:] == [-0.1235, -0.5]
    assert set(told["logprobs"][:-2]) == {None}
    assert told["advantages"] == [0.0] * (len(told["tokens"]) - 2) + [1.5, 1.5]
    assert told["finish_reason"] == "length"
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_3.jsonl"]


def test_the_best_and_the_worst_of_groups_that_teach_come_first(tmp_path: Path, chat: Chat) -> None:
    names = ("same", "same", "same", "differ", "differ", "differ", "more", "more", "more")
    rewards = (0, 0, 0, 0.5, 0, 1, 0, 0, 1)
    episodes = [episode(reward, name=name) for name, reward in zip(names, rewards, strict=True)]
    samples = [sample(chat, number, (reward - 0.4) * (number > 2)) for number, reward in enumerate(rewards)]
    # The last but two has two samples, as when a conversation was begun anew.
    lines = written(tmp_path, [*samples, samples[5]], episodes, chat, 7)
    told = [(line["task"], line["reward"], len(line["samples"])) for line in lines]
    assert told[:4] == [("differ", 1, 2), ("differ", 0, 1), ("more", 1, 1), ("more", 0, 1)]
    assert told[4:] == [("differ", 0.5, 1), ("more", 0, 1), ("same", 0, 1)]


@pytest.mark.parametrize("text", ["é漢🙂", "a\ufffdb", "</script><!--", "\x00\x1b[2J", "🙂" * 3])
def test_the_texts_of_tokens_are_those_of_the_whole_together(chat: Chat, text: str) -> None:
    ids = chat.reply_ids(text)
    texts = chat.token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == f"{text}<|end|>"


def test_a_character_that_is_cut_off_is_one_that_cannot_be_shown(chat: Chat) -> None:
    texts = chat.token_texts(chat.reply_ids("🙂")[:2])
    assert len(texts) == 2
    assert set("".join(texts)) == {"\ufffd"}


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, chat: Chat) -> None:
    (tmp_path / "samples").write_text("")
    with pytest.raises(Failure, match=r"samples/step_3\.jsonl cannot be written: (File exists|Not a directory)"):
        written(tmp_path, [sample(chat, 0, 1)], [episode(1)], chat, 1)
