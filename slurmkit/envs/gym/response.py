"""A conversation as OpenAI's Responses API tells of it: what servers judge."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slurmkit.envs.environment import Message

_THOUGHT_ENDS = "</think>"


def reply_items(reply: Message, number: int) -> Iterator[dict[str, Any]]:
    """The items that the model's reply is, the conversation's `number`-th: its thoughts, its text, its calls."""
    thoughts, end, text = reply.content.partition(_THOUGHT_ENDS)
    if not end:
        thoughts, text = "", reply.content
    if end:
        summary = [{"type": "summary_text", "text": thoughts.strip().removeprefix("<think>").strip()}]
        yield {"type": "reasoning", "id": f"rs_{number}", "summary": summary}
    if text.strip() or not reply.tool_calls:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        yield {"type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed", "content": content}
    for call in reply.tool_calls:
        called = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        yield {"type": "function_call", "id": f"fc_{call.id}", "status": "completed", **called}


def answer_item(answer: Message) -> dict[str, Any]:
    """The item that a tool's message is."""
    return {"type": "function_call_output", "call_id": answer.tool_call_id, "output": answer.content}


def response(output: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> dict[str, Any]:
    """The response to the request `params` that has these items."""
    return {
        "id": "resp_0",
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "model": params.get("model") or "policy",
        "output": list(output),
        "parallel_tool_calls": bool(params.get("parallel_tool_calls", True)),
        "tool_choice": params.get("tool_choice") or "auto",
        "tools": params.get("tools") or [],
    }
