"""Conversations of several turns, by the templates of real models: their tokens are the engine's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slurmkit.config.model import Generation, Policy, TokenizerCfg
from slurmkit.envs.environment import Message, Opening
from slurmkit.errors import UserError
from slurmkit.grpo.credit import make_samples
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.episode import Episode
from tests.support.conversations import ENDS, PLENTY, Engine, Scripted, Talk, make_talk, play, tool
from tests.support.groups import of

USER = (Message("user", "hello"),)
TOOLS = (tool("look"), tool("write"))


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Talk]:
    """Every second tokenizer adds a token to plain text."""
    folder = tmp_path_factory.mktemp("talks")
    return {name: make_talk(folder / name, name, adds_bos=number % 2 == 0) for number, name in enumerate(ENDS)}


def bare(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


def is_exact(talk: Talk, engine: Engine, episode: Episode, opening: Opening) -> None:
    """What an episode must be, whatever was said: the engine's tokens, and the template's text."""
    turns = [turn for sample in episode.samples for turn in sample]
    assert [turn.completion for turn in turns] == engine.given[: len(turns)]
    history, number = [*opening.messages], 0
    for sample in episode.samples:
        ids = list[int]()
        for turn in sample:
            ids += turn.added_ids
            assert tuple(ids) == engine.asked[number][0]
            # What the model is given says what the template makes of all that was said, raw.
            written = talk.written(history, opening.tools)
            if turn.begins_sample:
                assert talk.text(ids) == written
            assert bare(talk.text(ids)) == bare(written)
            assert written.endswith(talk.text(turn.added_ids))
            ids += turn.completion.token_ids.tolist()
            said = talk.text(turn.completion.token_ids.tolist())
            history += [Message("assistant", said.removesuffix(talk.end)), *answered(episode, number)]
            number += 1


def answered(episode: Episode, number: int) -> list[Message]:
    """What followed a reply."""
    places = [i for i, message in enumerate(episode.messages) if message.role == "assistant"]
    places.append(len(episode.messages))
    start, end = list(pairwise(places))[number]
    return list(episode.messages[start + 1 : end])


PIECES = (
    *("hello", " world", "\n", " ", "\t", "é漢🙂", "user\n", "<think>\nhm\n</think>\n\n", "<think>", "</think>"),
    *("<|im_end|>", "<|eot_id|>\n", "<SPECIAL_12>", "<tool_response>", "</tool_response>", "/no_think", '{"name": '),
    *('<tool_call>\n{"name": "look",  "arguments": {"text": "é"}}\n</tool_call>', "<tool_call>{", "<TOOLCALL>["),
    *('<TOOLCALL>[{"name": "look", "arguments": {}}]</TOOLCALL>', '{"name": "look", "parameters": {}}'),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
ANSWERS = st.lists(st.builds(Message, st.sampled_from(["user", "tool"]), TEXTS), min_size=1, max_size=2)


@settings(max_examples=120, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_conversation_matches_engine_tokens_and_trains_each_token_once(
    talks: Mapping[str, Talk], data: st.DataObject
) -> None:
    talk = talks[data.draw(st.sampled_from(sorted(talks)))]
    tools = TOOLS[: data.draw(st.integers(0, 2))]
    system = (Message("system", data.draw(TEXTS)),) if data.draw(st.booleans()) else ()
    opening = Opening((*system, *USER), tools)
    # An empty reply is one token, the end; a template may make something else of it.
    replies = data.draw(st.lists(TEXTS, min_size=1, max_size=4))
    answers = [data.draw(ANSWERS) for _ in replies[1:]]
    cut = [len(replies) - 1] if data.draw(st.booleans()) and replies[-1] else []
    engine, environment = Engine(talk, replies, cut), Scripted(opening, answers)
    episode = play(talk, engine, environment, replace(PLENTY, max_turns=len(replies)))
    is_exact(talk, engine, episode, opening)
    samples = make_samples([of(episode)])
    assert len(samples) == len(episode.samples)
    assert {sample.rollout_id for sample in samples} == {0}
    trained = numpy.concatenate([sample.logprobs[sample.loss_mask] for sample in samples])
    assert sorted(trained.tolist()) == sorted(-float(n) for n in range(1, episode.num_sampled_tokens + 1))
    for sample, turns in zip(samples, episode.samples, strict=True):
        mask = [flag for t in turns for flag in [False] * len(t.added_ids) + [True] * len(t.completion.token_ids)]
        assert sample.loss_mask.tolist() == mask
    assert environment.scored == 1


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_replies_and_tool_output_make_one_sample_whatever_its_spacing(talks: Mapping[str, Talk], name: str) -> None:
    call = '{"name":   "look", "arguments": {"text":"a"}}'
    call = f"<tool_call>{call}</tool_call>" if name == "qwen3" else call.replace("arguments", "parameters")
    opening = Opening((Message("system", "Be brief."), *USER), TOOLS)
    answers = [[Message("tool", "seen", tool_call_id=f"call_{n}", name="look")] for n in range(3)]
    engine, environment = Engine(talks[name], [call, call + "\n", call, "done"]), Scripted(opening, answers)
    episode = play(talks[name], engine, environment)
    is_exact(talks[name], engine, episode, opening)
    assert len(episode.samples) == 1
    assert episode.finish_reason == "stop"
    assert [message.role for message in episode.messages[2:]] == [*["assistant", "tool"] * 3, "assistant"]
    assert [call.id for message in environment.heard for call in message.tool_calls] == ["call_0", "call_1", "call_2"]
    # The sampled tokens are not those that their text would be encoded to.
    sampled = episode.turns[0].completion.token_ids.tolist()
    assert talks[name].tokenizer.encode(talks[name].text(sampled), add_special_tokens=False) != sampled


def test_thoughts_stay_during_tool_turns_and_a_user_turn_starts_a_sample(talks: Mapping[str, Talk]) -> None:
    thought = "<think>\nhm\n</think>\n\n"
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    replies = [thought + call, thought + "it is a", thought + "welcome"]
    answers = [[Message("tool", "a", tool_call_id="call_0", name="look")], [Message("user", "thanks")]]
    opening = Opening(USER, TOOLS)
    engine = Engine(talks["qwen3"], replies)
    episode = play(talks["qwen3"], engine, Scripted(opening, answers))
    is_exact(talks["qwen3"], engine, episode, opening)
    assert [len(turns) for turns in episode.samples] == [2, 1]
    assert "hm" not in talks["qwen3"].text(engine.asked[2][0])
    assert talks["qwen3"].text(engine.asked[1][0]).count("hm") == 1


def test_reply_ends_by_its_tokens_not_by_its_text_or_the_template(
    talks: Mapping[str, Talk],
) -> None:
    answers = [[Message("user", "and?")], [Message("user", "thanks")]]
    replies = ["I end with <|im_end|>\nor not", "<think>\nhm\n</think>\n\nyes", "bye"]
    opening = Opening(USER)
    engine = Engine(talks["qwen3"], replies)
    episode = play(talks["qwen3"], engine, Scripted(opening, answers))
    is_exact(talks["qwen3"], engine, episode, opening)
    assert [len(turns) for turns in episode.samples] == [2, 1]


def test_template_that_strips_thoughts_at_once_starts_a_sample_each_turn(talks: Mapping[str, Talk]) -> None:
    call = '</think><TOOLCALL>[{"name": "look", "arguments": {}}]</TOOLCALL>'
    answers = [[Message("tool", "a", tool_call_id="call_0", name="look")]] * 2
    opening = Opening(USER, TOOLS)
    engine = Engine(talks["nemotron_nano_v2"], [f"hm{call}", f"hm{call}", "hm</think>a"])
    episode = play(talks["nemotron_nano_v2"], engine, Scripted(opening, answers))
    is_exact(talks["nemotron_nano_v2"], engine, episode, opening)
    assert [len(turns) for turns in episode.samples] == [1, 1, 1]
    assert len(make_samples([of(episode)])) == 3


def test_calls_between_special_tokens_are_seen_and_the_rest_is_without(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tags = ("<tool_call>", "</tool_call>")
    talk = make_talk(tmp_path_factory.mktemp("special"), "qwen3", special=tags)
    said = 'I look. <tool_call>{"name": "look", "arguments": {}}</tool_call>'
    environment = Scripted(Opening(USER, TOOLS), [[Message("tool", "a", tool_call_id="call_0", name="look")]])
    engine = Engine(talk, [said, "<|im_start|>done"])
    episode = play(talk, engine, environment)
    assert engine.given[0].text == 'I look. {"name": "look", "arguments": {}}'
    assert environment.heard[0].content == "I look."
    assert [call.name for call in environment.heard[0].tool_calls] == ["look"]
    assert environment.heard[1] == Message("assistant", "done")
    assert len(episode.samples) == 1


def test_run_uses_its_configured_chat_template_variables_and_tool_parser(tmp_path: Path) -> None:
    talk = make_talk(tmp_path, "qwen3")
    template = tmp_path / "own.jinja"
    tools = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    template.write_text(tools + "{% for message in messages %}{{ message.content }}{% endfor %}{{ mood }}")
    policy = Policy(
        model_name=str(tmp_path),
        tokenizer=TokenizerCfg(chat_template=str(template), chat_template_kwargs={"mood": " gladly"}),
        generation=Generation(tool_parser="hermes"),
    )
    asked = Talk(Chat.of(tmp_path, policy), talk.tokenizer, talk.end)
    assert talk.text(asked.chat.prompt_ids(USER)) == "hello gladly"
    said = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    episode = play(asked, Engine(asked, [said, "b"]), Scripted(Opening(USER, TOOLS), [[Message("tool", "a")]]))
    assert episode.num_tool_calls == 1
    asked.chat.save(tmp_path / "saved")
    assert (tmp_path / "saved/chat_template.jinja").read_text() == template.read_text()
    template.unlink()
    with pytest.raises(UserError, match=r"policy.tokenizer.chat_template .*own.jinja: cannot be read: .*No such file"):
        Chat.of(tmp_path, policy)


def test_a_template_that_writes_no_tools_is_refused_with_the_key_to_set(tmp_path: Path) -> None:
    make_talk(tmp_path, "qwen3")
    blind = "{% for message in messages %}{{ message.content }}{% endfor %}"
    chat = Chat(tmp_path, tool_parser="hermes", template=blind)
    assert chat.prompt(Opening(USER)).text == "hello"
    with pytest.raises(UserError, match=r"writes no tools.* set policy\.tokenizer\.chat_template to"):
        chat.prompt(Opening(USER, TOOLS))
    described = Message("system", "Call look or write.")  # the environment writes them itself
    assert chat.prompt(Opening((described, *USER), TOOLS)).tools == TOOLS


def test_a_template_that_refuses_a_conversation_is_named_with_its_reason(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("refusing")
    talk = make_talk(folder, "qwen3")
    refusal = "raise_exception('no tools here') if message.role == 'tool' else message.content"
    talk.tokenizer.chat_template = f"{{% for message in messages %}}{{{{ {refusal} }}}}{{% endfor %}}"
    talk.tokenizer.save_pretrained(folder)
    refusing = Talk(Chat(folder), talk.tokenizer, talk.end)
    environment = Scripted(Opening(USER), [[Message("tool", "a")]])
    with pytest.raises(UserError, match="refuses a conversation of user, assistant, tool: no tools here"):
        play(refusing, Engine(refusing, ["a", "b"]), environment)
    with pytest.raises(UserError, match=r"policy\.generation\.tool_parser null: the chat template of"):
        play(refusing, Engine(refusing, ["a"]), Scripted(Opening(USER, TOOLS)))
