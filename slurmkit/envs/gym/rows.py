"""NeMo Gym's rows: a request of OpenAI's Responses API, and whatever else its server wants to be told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from slurmkit.envs.environment import Message, Task, Tool, ToolCall
from slurmkit.envs.rows import json_lines
from slurmkit.envs.text import refuse_half_pairs
from slurmkit.errors import UserError

_ROLES: Mapping[Any, Any] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row. Example of `body`: {"responses_create_params": {"input": [{"role": "user", …}], "tools": […]}, "id": 0}.

    `messages` and `tools` are what its request says to the model.
    """

    body: Mapping[str, Any]
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]


def read_tasks(path: Path) -> Iterator[Task]:
    """A task for each line of the file, whose `answer` is the line. UserError names the line that is no such row."""
    found = False
    for place, number, body in json_lines(path):
        text = json.dumps(body)
        try:
            messages = row_of(text).messages
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        found = True
        yield Task(f"{path.name}:{number}", messages[-1].content, text, context=messages[:-1])
    if not found:
        raise UserError(f"{path}: holds no task")


# All episodes of a group share one, and its tools, by which chat templates are cached.
@lru_cache(maxsize=4096)
def row_of(text: str) -> Row:
    """The row that a line is. ValueError says what is wrong with it."""
    body = json.loads(text)
    for name, value in body.items():
        refuse_half_pairs(value, name)
    params = body.get("responses_create_params")
    if not isinstance(params, dict):
        raise ValueError(f"the key 'responses_create_params' must hold an object (keys: {', '.join(body) or 'none'})")
    said = params.get("input")
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list) or not said:
        raise ValueError("responses_create_params.input must be text or a list of messages, with at least one")
    messages = list[Message]()
    if instructions := params.get("instructions"):
        messages.append(Message("system", _text(instructions, "responses_create_params.instructions")))
    for number, item in enumerate(said):
        _add(messages, item, f"responses_create_params.input.{number}")
    if not messages:
        raise ValueError("responses_create_params.input holds no message")
    definitions = params.get("tools") or []
    if not isinstance(definitions, list):
        raise ValueError(f"responses_create_params.tools must be a list, found {type(definitions).__name__}")
    return Row(body, tuple(messages), _tools(json.dumps(definitions)))


def messages_of(items: Iterable[Any]) -> Iterator[Message]:
    """What the items of a response say, as far as a chat of text can show it."""
    messages = list[Message]()
    for item in items:
        with suppress(ValueError):
            _add(messages, item, "output")
    yield from messages


def _add(messages: list[Message], item: Any, key: str) -> None:
    """Append what an item of the Responses API says, or a call to the assistant's message that it belongs to."""
    if not isinstance(item, dict):
        raise ValueError(f"{key} must be an object, found {type(item).__name__}")
    match item.get("type", "message"):
        case "message" if item.get("role") in _ROLES:
            messages.append(Message(_ROLES[item["role"]], _text(item.get("content"), f"{key}.content")))
        case "function_call":
            call = ToolCall(*(_text(item.get(name), f"{key}.{name}") for name in ("call_id", "name", "arguments")))
            before = messages.pop() if messages and messages[-1].role == "assistant" else Message("assistant", "")
            messages.append(Message("assistant", before.content, (*before.tool_calls, call)))
        case "function_call_output":
            call_id = _text(item.get("call_id"), f"{key}.call_id")
            named = [call.name for message in messages for call in message.tool_calls if call.id == call_id]
            if not named:
                raise ValueError(f"{key}.call_id {call_id!r} answers no call before it")
            output = _text(item.get("output"), f"{key}.output")
            messages.append(Message("tool", output, tool_call_id=call_id, name=named[-1]))
        case "reasoning":
            pass  # of earlier turns: chat templates leave it out
        case "message":
            raise ValueError(f"{key}.role must be one of {', '.join(_ROLES)}, found {item.get('role')!r}")
        case kind:
            raise ValueError(f"{key}.type {kind!r} is nothing that a model of text can be shown")


def _text(content: Any, key: str) -> str:
    """Text, or the text of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{key} must be text, found {type(content).__name__}")
    parts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{key} holds {kind}: only text can be shown to the model")
        parts.append(part["text"])
    return "".join(parts)


@lru_cache(maxsize=4096)
def _tools(definitions: str) -> tuple[Tool, ...]:
    """Tools as chat completions have them, from the list of those of the Responses API, as JSON."""
    tools = []
    for number, found in enumerate(json.loads(definitions)):
        key = f"responses_create_params.tools.{number}"
        if not isinstance(found, dict) or found.get("type") != "function":
            raise ValueError(f"{key} must be a tool of type function, found {json.dumps(found)[:80]}")
        name, parameters = found.get("name"), found.get("parameters") or {}
        if not isinstance(name, str) or not name:
            raise ValueError(f"{key}.name must be the tool's name, found {name!r}")
        if not isinstance(parameters, dict):
            raise ValueError(f"{key}.parameters must be a JSON schema, found {type(parameters).__name__}")
        function = {"name": name, "description": found.get("description") or "", "parameters": parameters}
        tools.append(Tool({"type": "function", "function": function}))
    return tuple(tools)
