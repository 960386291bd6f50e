"""Tool calls as models write them, well and badly."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmkit.config.model import ToolParser
from slurmkit.envs.environment import ToolCall
from slurmkit.rollout.tool_calls import MalformedCall, read_calls, recognised
from tests.support.conversations import TEMPLATES

KNOWN = ("look", "write")
LOOK = '{"name": "look", "arguments": {"text": "a"}}'
BLOCK = f"<tool_call>{LOOK}</tool_call>"
FORMS: dict[str, str] = {"hermes": "<tool_call>", "llama3_json": '"parameters"', "nemotron": "<TOOLCALL>["}


@pytest.mark.parametrize(
    ("name", "parser"), [("qwen3", "hermes"), ("llama3_1", "llama3_json"), ("nemotron_nano_v2", "nemotron")]
)
def test_the_form_is_recognised_by_the_chat_template(name: str, parser: ToolParser) -> None:
    assert recognised((TEMPLATES / f"{name}.jinja").read_text()) == parser


@pytest.mark.parametrize("template", ["{{ message.content }}", "<tool_call>\n<function=name>", "<tool_call>x<arg_key>"])
def test_a_form_that_is_none_of_ours_is_not_taken_for_one(template: str) -> None:
    assert recognised(template) is None


@pytest.mark.parametrize(
    ("parser", "text", "content"),
    [
        ("hermes", f"I look.\n<tool_call>\n{LOOK}\n</tool_call>", "I look."),
        ("hermes", f"<tool_call>{LOOK}", ""),
        ("hermes", f"<think>{BLOCK}</think>\n{BLOCK}", f"<think>{BLOCK}</think>"),
        ("llama3_json", LOOK.replace("arguments", "parameters"), ""),
        ("llama3_json", f"<|python_tag|>{LOOK.replace('arguments', 'parameters')}", ""),
        ("llama3_json", f" {LOOK} ", ""),
        ("nemotron", f"hm\n</think>\n<TOOLCALL>[{LOOK}]</TOOLCALL>\n", "hm\n</think>"),
    ],
)
def test_a_call_is_read_and_what_is_beside_it_stays(parser: ToolParser, text: str, content: str) -> None:
    reading = read_calls(text, parser, KNOWN, first=3)
    assert reading.calls == (ToolCall("call_3", "look", '{"text": "a"}'),)
    assert reading.content == content


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", f"<tool_call>{LOOK}</tool_call>\n<tool_call>{LOOK}</tool_call>"),
        ("hermes", f"<tool_call>[{LOOK}, {LOOK}]</tool_call>"),  # SmolLM2
        ("llama3_json", f"{LOOK}; {LOOK}"),
        ("nemotron", f"<TOOLCALL>[{LOOK}, {LOOK}]</TOOLCALL>"),
    ],
)
def test_several_calls_are_read_in_order_and_numbered(parser: ToolParser, text: str) -> None:
    assert [call.id for call in read_calls(text, parser, KNOWN, first=1).tool_calls] == ["call_1", "call_2"]


@pytest.mark.parametrize("parser", get_args(ToolParser))
@pytest.mark.parametrize("text", ["", "The answer is 4.", "[1, 2]", '{"answer": 4}', "<think>x</think> {"])
def test_a_reply_without_a_call_is_left_as_it_is(parser: ToolParser, text: str) -> None:
    reading = read_calls(text, parser, KNOWN)
    assert (reading.content, reading.calls) == (text, ())


MALFORMED = [
    ('{"name": "look", "arguments": {"text": }}', "", "it is not valid JSON: Expecting value at character 39"),
    ('{"name": "look", "arguments": {"text": NaN}}', "", "it is not valid JSON: NaN is not JSON"),
    (f'{{"name": "look", "arguments": {"[" * 100_000}', "", "it is not valid JSON: too deep"),
    ('{"name": 3, "arguments": {}}', "", 'it has no "name"'),
    ('{"name": "", "arguments": {}}', "", 'it has no "name"'),
    ('{"name": "look", "arguments": "text"}', "look", "must be a JSON object, {} for none"),
    ('{"name": "look"}', "look", "must be a JSON object, {} for none"),
    ('{"name": "look", "arguments": {"text": "\\ud800"}}', "look", "half of a surrogate pair"),
    ('{"name": "lock\\ud800", "arguments": {}}', "", 'there is no tool "lock\\ud800". There are: look, write.'),
]


@pytest.mark.parametrize("parser", get_args(ToolParser))
@pytest.mark.parametrize(("found", "name", "problem"), MALFORMED, ids=[each[2][:30] for each in MALFORMED])
def test_malformed_call_is_answered_with_its_error_and_stays_in_the_text(
    parser: ToolParser, found: str, name: str, problem: str
) -> None:
    found = found.replace("arguments", "parameters") if parser == "llama3_json" else found
    before = {"hermes": "<tool_call>", "llama3_json": "", "nemotron": "<TOOLCALL>["}[parser]
    after = {"hermes": "</tool_call>", "llama3_json": "", "nemotron": "]</TOOLCALL>"}[parser]
    text = before + found + after
    reading = read_calls(text, parser, KNOWN)
    (call,) = reading.calls
    assert isinstance(call, MalformedCall)
    assert (call.id, call.name) == ("call_0", name)
    problem = problem.replace("character 39", "character 40") if parser != "hermes" else problem
    assert problem in call.problem
    assert call.problem.startswith("Error: ")
    call.problem.encode()
    assert reading.content == text
    if "there is no tool" not in problem:
        assert {"hermes": "<tool_call>", "llama3_json": '"parameters"', "nemotron": "<TOOLCALL>["}[
            parser
        ] in call.problem


def test_valid_call_among_invalid_ones_runs_and_invalid_ones_stay_as_text() -> None:
    reading = read_calls(f"<tool_call>{{</tool_call>a<tool_call>{LOOK}</tool_call>b", "hermes", KNOWN)
    assert [type(call) for call in reading.calls] == [MalformedCall, ToolCall]
    assert [call.id for call in reading.calls] == ["call_0", "call_1"]
    assert reading.content == "<tool_call>{</tool_call>ab"
    many = read_calls(f"<TOOLCALL>[{LOOK}, 3]</TOOLCALL>", "nemotron", KNOWN)
    assert [type(call) for call in many.calls] == [ToolCall, MalformedCall]
    for empty in ("{}", "[]", '"look"'):
        (call,) = read_calls(f"<TOOLCALL>{empty}</TOOLCALL>", "nemotron", KNOWN).calls
        assert isinstance(call, MalformedCall)
        assert "no list with calls in it" in call.problem


JSONS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda each: st.lists(each, max_size=3), max_leaves=5
)


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(
    st.sampled_from(get_args(ToolParser)),
    st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(["<tool_call>", "</tool_call>", "<TOOLCALL>", "</TOOLCALL>", "<|python_tag|>", "</think>"]),
            st.sampled_from(['{"name": "look", ', '"arguments": ', '"parameters": ', "{", "}", "[", "]", ";", LOOK]),
            st.builds(json.dumps, st.dictionaries(st.sampled_from(["name", "arguments", "parameters"]), JSONS)),
        ),
        max_size=8,
    ).map("".join),
)
def test_whatever_a_model_says_is_read_without_an_error(parser: ToolParser, text: str) -> None:
    reading = read_calls(text, parser, KNOWN)
    for call in reading.calls:
        if isinstance(call, ToolCall):
            assert call.name in KNOWN
            assert isinstance(json.loads(call.arguments), dict)
        else:
            assert call.problem.startswith("Error: ")
    if not reading.calls:
        assert reading.content == text
