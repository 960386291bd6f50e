"""Tool calls, read from what a model says.

hermes (Nous Hermes, Qwen): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as many as it likes. SmolLM2 writes
a list of calls between the same tags.
llama3_json (Llama 3.1 and later): a reply that is `{"name": …, "parameters": {…}}`, also after `<|python_tag|>`, and
several with `;` between. nemotron (Nemotron Nano v2): `<TOOLCALL>[{"name": …, "arguments": {…}}, …]</TOOLCALL>`.

Nothing here raises, whatever a model says: what is no call that can be made says why, for the model to read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any, NoReturn

from slurmkit.config.model import ToolParser
from slurmkit.envs.environment import ToolCall
from slurmkit.envs.text import is_text

_SHOWN = 100
_THOUGHT = "</think>"
_PYTHON_TAG = "<|python_tag|>"
_FORMS = {
    "hermes": '<tool_call>{"name": "…", "arguments": {…}}</tool_call>',
    "llama3_json": '{"name": "…", "parameters": {…}}',
    "nemotron": '<TOOLCALL>[{"name": "…", "arguments": {…}}]</TOOLCALL>',
}
# One that is not closed ends with the reply.
_BLOCKS = {
    "hermes": re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL),
    "nemotron": re.compile(r"<TOOLCALL>(.*?)(?:</TOOLCALL>|\Z)", re.DOTALL),
}
_BEGINS_A_CALL = re.compile(r'\{\s*"(name|type|parameters)"')


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """Something that was meant as a call and cannot be made; `problem` is an answer that the model can act on."""

    id: str
    name: str
    """The tool's, as far as it could be read."""
    problem: str


@dataclass(frozen=True, slots=True)
class Reading:
    """A reply as it was understood: its calls in order, and the text beside those that can be made."""

    content: str
    calls: tuple[ToolCall | MalformedCall, ...] = ()

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Those that can be made."""
        return tuple(call for call in self.calls if isinstance(call, ToolCall))


def recognised(chat_template: str) -> ToolParser | None:
    """The form in which a model with this chat template calls tools, None where it is none of ours."""
    if "<TOOLCALL>" in chat_template:
        return "nemotron"
    # Others put XML between the same tags.
    if "<tool_call>" in chat_template and not any(tag in chat_template for tag in ("<function=", "<arg_key>")):
        return "hermes"
    return "llama3_json" if '"parameters": ' in chat_template else None


def read_calls(text: str, parser: ToolParser, known: Collection[str], *, first: int = 0) -> Reading:
    """The calls in a whole reply, special tokens included. `known` are the tools' names, `first` numbers the first.

    What is said before the end of a thought (`</think>`) is no call.
    """
    thought, end, said = text.rpartition(_THOUGHT)
    spans = _objects(said) if parser == "llama3_json" else _blocks(said, parser)
    calls, kept, last = list[ToolCall | MalformedCall](), [thought, end], 0
    for start, stop, found in spans:
        read = [_call(each, parser, known, f"call_{first + len(calls) + index}") for index, each in enumerate(found)]
        kept.append(said[last:start])
        if not all(isinstance(call, ToolCall) for call in read):
            kept.append(said[start:stop])
        calls += read
        last = stop
    return Reading("".join([*kept, said[last:]]).strip() if calls else text, tuple(calls))


@dataclass(frozen=True, slots=True)
class _Unreadable:
    problem: str


def _blocks(said: str, parser: ToolParser) -> Iterator[tuple[int, int, list[Any]]]:
    """Each block between tags: where it stands, and what should be calls."""
    for block in _BLOCKS[parser].finditer(said):
        found = _loaded(block[1])
        wants_list = parser == "nemotron" and not isinstance(found, _Unreadable | list)
        if wants_list or found == []:
            found = _Unreadable("it is no list with calls in it")
        yield block.start(), block.end(), found if isinstance(found, list) else [found]


def _objects(said: str) -> Iterator[tuple[int, int, list[Any]]]:
    """The JSON objects that a reply consists of, all of them together; nothing where it is said to somebody."""
    is_tagged = _PYTHON_TAG in said
    start = said.index(_PYTHON_TAG) + len(_PYTHON_TAG) if is_tagged else 0
    rest = said[start:].strip()
    if not is_tagged and not _BEGINS_A_CALL.match(rest):
        return
    decoder, found = json.JSONDecoder(parse_constant=_refuse), list[Any]()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError) as error:
            found.append(_Unreadable(_why(error)))
            break
        found.append(value)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    if found:
        yield (start - len(_PYTHON_TAG) if is_tagged else 0), len(said), found


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return _Unreadable(_why(error))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _why(error: Exception) -> str:
    if isinstance(error, JSONDecodeError):
        return f"it is not valid JSON: {error.msg} at character {error.pos}"
    return f"it is not valid JSON: {'too deep' if isinstance(error, RecursionError) else error}"


def _call(found: Any, parser: ToolParser, known: Collection[str], number: str) -> ToolCall | MalformedCall:
    """The call that a JSON value is, or why it is none."""
    if not isinstance(found, dict):
        problem = found.problem if isinstance(found, _Unreadable) else "it is no JSON object"
        return MalformedCall(number, "", _answer(problem, parser))
    name = found.get("name")
    if not isinstance(name, str) or not name:
        return MalformedCall(number, "", _answer('it has no "name"', parser))
    if name not in known:
        shown = json.dumps(name[:_SHOWN])
        return MalformedCall(number, "", f"Error: there is no tool {shown}. There are: {', '.join(known)}.")
    key = "parameters" if parser == "llama3_json" and "parameters" in found else "arguments"
    if not isinstance(found.get(key), dict):
        wanted = "parameters" if parser == "llama3_json" else "arguments"
        return MalformedCall(number, name, _answer(f'"{wanted}" must be a JSON object, {{}} for none', parser))
    arguments = json.dumps(found[key], ensure_ascii=False)
    if not is_text(arguments):
        return MalformedCall(number, name, _answer("its arguments hold half of a surrogate pair", parser))
    return ToolCall(number, name, arguments)


def _answer(problem: str, parser: ToolParser) -> str:
    return f"Error: this tool call was not made: {problem}. Write {_FORMS[parser]}."
