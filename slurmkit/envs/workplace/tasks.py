"""Tasks of the Workplace Assistant, from NeMo Gym's rows or WorkBench's CSV files."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.config.data import DataSource
from slurmkit.envs.environment import Message, Task, Tool
from slurmkit.envs.rows import Record, read_records
from slurmkit.envs.text import refuse_half_pairs
from slurmkit.envs.workplace.definitions import DEFINITIONS
from slurmkit.envs.workplace.scoring import Call, failures
from slurmkit.envs.workplace.world import World
from slurmkit.errors import UserError

PROMPT = (
    "It is Thursday, 2023-11-30, 23:59:00. Go by this date and time. Meetings start at 9:00 or later and are over by "
    "18:00."
)
"""What models are told before tasks that bring no such message of their own."""
_GYM_COLUMNS = ("responses_create_params", "ground_truth")
# Of a task: all messages, the functions that are offered, the calls that are expected.
_Parts = tuple[tuple[Message, ...], Sequence[Mapping[str, Any]], tuple[Call, ...]]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Goal(NamedTuple):
    """What Task.answer says: the calls to be made, and the key of the tools that are offered."""

    calls: tuple[Call, ...]
    tools: str

    @classmethod
    def of(cls, answer: str) -> Goal:
        """Read back."""
        found = json.loads(answer)
        return cls(tuple((name, arguments) for name, arguments in found["calls"]), found["tools"])

    def answer(self) -> str:
        """As Task.answer."""
        return json.dumps({"calls": self.calls, "tools": self.tools})


class ToolSets:
    """Tools that rows bring, each set once: as a rule all rows have the same 27."""

    def __init__(self) -> None:
        self._sets: dict[str, tuple[Tool, ...]] = {}
        self._tools: dict[str, Tool] = {}

    def key(self, definitions: Sequence[Mapping[str, Any]]) -> str:
        """Of the set of tools with these functions."""
        texts = [json.dumps(definition) for definition in definitions]
        key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        if key not in self._sets:
            for text in texts:
                self._tools.setdefault(text, Tool({"type": "function", "function": json.loads(text)}))
            self._sets[key] = tuple(self._tools[text] for text in texts)
        return key

    def __getitem__(self, key: str) -> tuple[Tool, ...]:
        return self._sets[key]


def read_tasks(source: DataSource, key: str, world: World, tools: ToolSets) -> Iterator[Task | UserError]:
    """All tasks of a source; for a row that is none, the error that names it by file and line.

    Raises UserError where the source cannot be read.
    """
    is_csv = Path(source.data_path or "").suffix == ".csv"
    for record in _workbench(source) if is_csv else read_records(source, key, _GYM_COLUMNS):
        try:
            messages, offered, calls = _workbench_task(record.values) if is_csv else _gym_task(record.values)
            _check(calls, world)
        except ValueError as error:
            yield UserError(f"{record.place}: {error}")
            continue
        goal = Goal(calls, tools.key(offered))
        yield Task(record.name, messages[-1].content, goal.answer(), context=messages[:-1])


def _gym_task(row: Mapping[str, Any]) -> _Parts:
    parameters = _json(row.get("responses_create_params"), "responses_create_params", dict)
    refuse_half_pairs(parameters, "responses_create_params")
    said = parameters.get("input")
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list) or not said:
        raise ValueError("there is no prompt: responses_create_params.input must be a list of messages")
    messages = tuple(_message(message, f"responses_create_params.input.{i}") for i, message in enumerate(said))
    if messages[-1].role != "user":
        raise ValueError(
            f"there is no prompt: the last message of responses_create_params.input is the {messages[-1].role}'s, and "
            "must be the user's"
        )
    found = _json(parameters.get("tools", []), "responses_create_params.tools", list)
    refuse_half_pairs(found, "responses_create_params.tools")
    offered = [_function(tool, f"responses_create_params.tools.{i}") for i, tool in enumerate(found)]
    gold = _json(row.get("ground_truth"), "ground_truth", list)
    return messages, offered, tuple(_gold_call(call, f"ground_truth.{i}") for i, call in enumerate(gold))


def _json(value: Any, key: str, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """A value of a kind, or the text of one: tables have no other way."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key} is no JSON: {error}") from None
    if not isinstance(value, kind):
        name = "an object" if kind is dict else "a list"
        raise ValueError(f"{key} must be {name}, found {type(value).__name__}")
    return value


def _message(message: Any, key: str) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f"{key} must have a role of {', '.join(_ROLES)} and content that is text: {_shown(message)}")
    return Message(_ROLES[role], content)  # type: ignore[arg-type] # one of the literals


def _function(tool: Any, key: str) -> Mapping[str, Any]:
    """As chat templates have it, nothing but "type" left out. A table's rows have null for what a tool has not."""
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    parameters = function.get("parameters")
    if not isinstance(function.get("name"), str) or not isinstance(parameters, dict):
        raise ValueError(f"{key} is no tool with a name and parameters: {_shown(tool)}")
    if not isinstance(parameters.get("properties"), dict):
        raise ValueError(f"{key}.parameters must have properties: {_shown(parameters)}")
    if function["name"] not in DEFINITIONS:
        raise ValueError(f"{key}.name: there is no tool {function['name']} here")
    properties = {name: value for name, value in parameters["properties"].items() if value is not None}
    kept = {name: value for name, value in function.items() if name != "type"}
    return {**kept, "parameters": {**parameters, "properties": properties}}


def _gold_call(call: Any, key: str) -> Call:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"{key} must have a name and arguments: {_shown(call)}")
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        raise ValueError(f"{key}.arguments must be a JSON object as text, found {type(arguments).__name__}")
    _json(arguments, f"{key}.arguments", dict)
    return call["name"], arguments


def _check(calls: Sequence[Call], world: World) -> None:
    """ValueError for a call of no tool, with arguments of the wrong type, or that fails."""
    for name, text in calls:
        if name not in DEFINITIONS:
            raise ValueError(f"the expected calls name a tool that there is not: {name}")
        parameters, arguments = DEFINITIONS[name]["parameters"], json.loads(text)
        refuse_half_pairs(arguments, name)
        for argument, value in arguments.items():
            kind = parameters["properties"].get(argument, {}).get("type")
            if kind is None:
                raise ValueError(f"{name} takes no {argument} (it takes {', '.join(parameters['properties'])})")
            if not isinstance(value, str if kind == "string" else int) or isinstance(value, bool):
                raise ValueError(f"{name}: {argument} must be of type {kind}, found {_shown(value)}")
        for argument in parameters["required"]:
            if argument not in arguments:
                raise ValueError(f"{name} needs {argument}")
    for failure in failures(world, calls):
        raise ValueError(f"an expected call fails: {failure}")


def _workbench(source: DataSource) -> Iterator[Record]:
    path = Path(source.data_path or "")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise UserError(f"{path}: holds no task")
    for line, row in rows:
        yield Record(f"{path.name}:{line}", f"{path}:{line}", row)


def _workbench_task(row: Mapping[str, Any]) -> _Parts:
    query, answer = row.get("query"), row.get("answer")
    if not query or not query.strip():
        raise ValueError("there is no prompt: the column 'query' must hold text")
    try:
        calls = [_call_of(text.replace("\n", "\\n")) for text in ast.literal_eval(answer or "")]
    except (ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise ValueError(f"the column 'answer' must be a list of calls, found {_shown(answer)}: {error}") from None
    offered = [{key: value for key, value in tool.items() if key != "type"} for tool in DEFINITIONS.values()]
    return (Message("system", PROMPT), Message("user", query)), offered, tuple(calls)


def _call_of(text: str) -> Call:
    """From calendar.delete_event.func(event_id="00000256")."""
    expression = ast.parse(text.strip(), mode="eval").body
    if not isinstance(expression, ast.Call) or expression.args or not all(each.arg for each in expression.keywords):
        raise ValueError(f"{text!r} is no call with named arguments")
    words = ast.unparse(expression.func).split(".")
    if len(words) != 3 or words[2] != "func":
        raise ValueError(f"{text!r} is no TOOLKIT.TOOL.func(…)")
    arguments = {str(each.arg): ast.literal_eval(each.value) for each in expression.keywords}
    return f"{words[0]}_{words[1]}", json.dumps(arguments)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
