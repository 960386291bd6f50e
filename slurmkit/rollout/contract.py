"""Checks of what environments and agents return. Each returns the value in the form that rollouts use."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy

from slurmkit.config.algorithm import MAX_REWARD
from slurmkit.envs.environment import Message, Opening, Played, PolicyCall, Score, Tool, ToolCall
from slurmkit.envs.text import is_text

_ROLES = ("system", "user", "assistant", "tool")
_MAX_TOKEN_ID = 2**31 - 1  # samples hold token ids as int32


class ContractError(Exception):
    """An environment returned a value that its protocol does not allow."""


def check_opening(found: Any) -> Opening:
    """Check what `Environment.start` returned."""
    _need(isinstance(found, Opening), "start must return an Opening", found)
    messages, tools = _messages(found.messages, "start: messages"), _sequence(found.tools, "start: tools")
    if not messages:
        raise ContractError("an opening without a message")
    for index, tool in enumerate(tools):
        _need(isinstance(tool, Tool), f"start: tools[{index}] must be a Tool", tool)
        _check_tool(tool)
    return Opening(messages, tools)


def check_answers(found: Any) -> tuple[Message, ...]:
    """Check what `Environment.step` returned; None counts as no message."""
    return () if found is None else _messages(found, "step: messages")


def check_score(found: Any) -> Score:
    """Check what `Environment.score` returned."""
    _need(isinstance(found, Score), "score must return a Score", found)
    _need(isinstance(found.correct, bool | numpy.bool_), "score: correct must be True or False", found.correct)
    _need(isinstance(found.counts, Mapping), "score: counts must be a mapping", found.counts)
    counts = {_text(name, "score: a name in counts"): _number(value, name) for name, value in found.counts.items()}
    return Score(_number(found.reward, "reward"), bool(found.correct), counts)


def check_played(found: Any) -> Played:
    """Check what `Agent.run` returned."""
    _need(isinstance(found, Played), "run must return a Played", found)
    calls = _sequence(found.calls, "run: calls")
    if not calls:
        raise ContractError("run: calls must have at least one call of the policy")
    for index, call in enumerate(calls):
        _check_policy_call(call, f"run: calls[{index}]")
    is_count = _are(Integral, (found.num_tool_calls,)) and found.num_tool_calls >= 0
    _need(is_count, "run: num_tool_calls must be a whole number", found.num_tool_calls)
    _need(isinstance(found.is_cut, bool), "run: is_cut must be True or False", found.is_cut)
    messages = _messages(found.messages, "run: messages")
    return Played(calls, messages, int(found.num_tool_calls), check_score(found.score), found.is_cut)


def _check_policy_call(call: Any, place: str) -> None:
    _need(isinstance(call, PolicyCall), f"{place} must be a PolicyCall", call)
    for name in ("prompt_ids", "token_ids"):
        ids = getattr(call, name)
        are_ids = _are(Integral, ids) and min(ids) >= 0 and max(ids) <= _MAX_TOKEN_ID
        _need(are_ids, f"{place}.{name} must be a tuple of one or more token ids", ids)
    # NaN is allowed: a token whose logprob is no finite number is not trained on.
    _need(_are(Real, call.logprobs), f"{place}.logprobs must be a tuple of one or more numbers", call.logprobs)
    if len(call.token_ids) != len(call.logprobs):
        raise ContractError(f"{place} has {len(call.token_ids)} token_ids and {len(call.logprobs)} logprobs")


def _messages(found: Any, place: str) -> tuple[Message, ...]:
    return tuple(_message(each, f"{place}[{index}]") for index, each in enumerate(_sequence(found, place)))


def _message(found: Any, place: str) -> Message:
    _need(isinstance(found, Message), f"{place} must be a Message", found)
    _need(found.role in _ROLES, f"{place}.role must be one of {', '.join(_ROLES)}", found.role)
    _text(found.content, f"{place}.content")
    _text(found.tool_call_id, f"{place}.tool_call_id")
    _text(found.name, f"{place}.name")
    calls = _sequence(found.tool_calls, f"{place}.tool_calls")
    for index, call in enumerate(calls):
        _check_call(call, f"{place}.tool_calls[{index}]")
    message: Message = replace(found, tool_calls=calls)
    return message


def _check_call(call: Any, place: str) -> None:
    _need(isinstance(call, ToolCall), f"{place} must be a ToolCall", call)
    for name in ("id", "name", "arguments"):
        _text(getattr(call, name), f"{place}.{name}")
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    _need(isinstance(arguments, dict), f"{place}.arguments must be a JSON object as text", call.arguments)


# By identity, as a Tool is equal to itself alone.
@lru_cache(maxsize=4096)
def _check_tool(tool: Tool) -> None:
    definition: Any = tool.definition
    function = definition.get("function") if isinstance(definition, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    _need(isinstance(name, str) and bool(name), "start: a tool's definition must have a function.name", definition)
    try:
        json.dumps(dict(definition), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"start: the definition of the tool {name!a} cannot be written as JSON: {error}") from None


def _text(found: Any, place: str) -> str:
    _need(isinstance(found, str), f"{place} must be text", found)
    _need(is_text(found), f"{place} must be text without half of a surrogate pair", found)
    return str(found)


def _number(found: Any, name: str) -> float:
    allowed = f"score: {name} must be a number from {-MAX_REWARD:g} to {MAX_REWARD:g}"
    _need(_are(Real, (found,)) and bool(-MAX_REWARD <= found <= MAX_REWARD), allowed, found)
    return float(found)


def _are(kind: type, found: Any) -> bool:
    """Return whether this is a tuple of one or more numbers of a kind, numpy's included."""
    # By their types, as there may be a hundred thousand.
    kinds = set(map(type, found)) if isinstance(found, tuple) else set[type]()
    return bool(kinds) and bool not in kinds and all(issubclass(each, kind) for each in kinds)


def _sequence(found: Any, place: str) -> tuple[Any, ...]:
    is_sequence = isinstance(found, Sequence) and not isinstance(found, str | bytes)
    _need(is_sequence, f"{place} must be a list or a tuple", found)
    items: Iterable[Any] = found
    return tuple(items)


def _need(is_met: bool, requirement: str, found: Any) -> None:
    if not is_met:
        raise ContractError(f"{requirement}, found {reprlib.repr(found)} ({type(found).__name__})")
