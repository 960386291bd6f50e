"""Gym's rows as tasks, and the server that must be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from slurmkit.config.schema import TrainConfig
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Message, ToolCall
from slurmkit.envs.gym.rows import read_tasks, row_of
from slurmkit.errors import UserError
from tests.envs.gym.test_resources import configured
from tests.support.gym_server import gym_server, lines, row, serving
from tests.support.requirements import need_shared_data

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


def params(**found: Any) -> str:
    return json.dumps({"responses_create_params": {"input": "hello", **found}})


def test_the_workplace_s_rows_are_tasks_with_all_their_tools() -> None:
    path = need_shared_data("workplace_gym/example.jsonl")
    tasks = list(read_tasks(path))
    assert [task.name for task in tasks] == [f"example.jsonl:{number}" for number in range(1, 6)]
    assert tasks[0].question.startswith("Reply to carlos's last email")
    assert [message.role for message in tasks[0].context] == ["system"]
    found = row_of(tasks[0].answer)
    assert found.body == json.loads(path.read_text().splitlines()[0])
    assert len(found.tools) == 27
    assert found.tools[0].definition["function"]["name"] == "company_directory_find_email_address"
    assert row_of(tasks[1].answer).tools is found.tools, "equal tools are the same, by which prompts are cached"


def test_items_of_earlier_turns_become_messages_with_their_calls() -> None:
    said = [
        {
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be "}, {"type": "input_text", "text": "kind."}],
        },
        {"role": "user", "content": "go", "type": "message"},
        {"type": "reasoning", "id": "r", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I call."}], "type": "message"},
        *(CALL, {**CALL, "call_id": "c2"}),
        {"type": "function_call_output", "call_id": "c2", "output": "two"},
    ]
    assert row_of(params(input=said, instructions="Obey.")).messages == (
        *(Message("system", "Obey."), Message("system", "Be kind."), Message("user", "go")),
        Message("assistant", "I call.", (ToolCall("c1", "f", "{}"), ToolCall("c2", "f", "{}"))),
        Message("tool", "two", tool_call_id="c2", name="f"),
    )
    assert row_of(params()).messages == (Message("user", "hello"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1}', "'responses_create_params' must hold an object (keys: a)"),
        (params(input=[]), "input must be text or a list of messages, with at least one"),
        (params(input=[{"type": "reasoning"}]), "input holds no message"),
        (params(input=["a"]), "input.0 must be an object, found str"),
        (params(input=[{"role": "robot", "content": ""}]), "input.0.role must be one of system, developer, user"),
        (params(input=[{"role": "user", "content": 3}]), "input.0.content must be text, found int"),
        (
            params(input=[{"role": "user", "content": [{"type": "input_image"}]}]),
            "input.0.content holds input_image: only text",
        ),
        (params(input=[{"type": "mcp_call"}]), "input.0.type 'mcp_call' is nothing that a model of text"),
        (params(input=[{**CALL, "type": "function_call_output", "output": ""}]), "'c1' answers no call before it"),
        (
            params(tools=[{"type": "web_search"}]),
            'tools.0 must be a tool of type function, found {"type": "web_search"}',
        ),
        (params(tools=[{"type": "function"}]), "tools.0.name must be the tool's name, found None"),
        (
            params(tools=[{"type": "function", "name": "f", "parameters": 3}]),
            "tools.0.parameters must be a JSON schema",
        ),
        (params(tools="all"), "tools must be a list, found str"),
        (
            params(input=[{"role": "user", "content": [{"text": "\ud83d"}]}]),
            "the key 'responses_create_params.input.0.content.0.text' holds half of a surrogate pair",
        ),
        (
            json.dumps({"responses_create_params": {"input": "a"}, "truth": {"\ude00": 1}}),
            r"the key 'truth.\ude00' holds half of a surrogate pair",
        ),
    ],
)
def test_a_row_that_cannot_be_put_to_a_model_is_named_by_file_line_and_key(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{params()}\n{line}\n")
    with pytest.raises(UserError) as error:
        list(read_tasks(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def refusal(config: TrainConfig) -> str:
    with pytest.raises(UserError) as error:
        make_domain(config)
    return str(error.value)


def test_a_missing_or_foreign_gym_server_is_refused_before_the_start(tmp_path: Path) -> None:
    with gym_server() as server:
        gone = server.url
    message = refusal(configured(tmp_path, [row()], url=gone, start_timeout_seconds=1))
    assert message.startswith(f"env.gym.url {gone}: GET /seed_session: Cannot connect to host")
    assert message.endswith("a resources server of NeMo Gym, which takes POST /seed_session and POST /verify")
    with serving(web.Application()) as url:
        message = refusal(configured(tmp_path, [row()], url=url))
        assert message.startswith(f"env.gym.url {url}: GET /seed_session was answered with 404, not 405. It must be")


def test_a_server_that_starts_with_the_run_is_waited_for(tmp_path: Path) -> None:
    left = [503, 503]

    async def starting(request: web.Request) -> web.Response:
        return web.Response(status=left.pop() if left else 405)

    app = web.Application()
    app.router.add_get("/{path}", starting)
    with serving(app) as url:
        assert len(make_domain(configured(tmp_path, [row(), row(1)], url=url)).train_tasks) == 2
    assert not left


@pytest.mark.parametrize(
    ("gym", "message"),
    [
        ({}, "needs a server, either gym.url or gym.agent_url: neither is given"),
        ({"url": "http://a", "agent_url": "http://b"}, "gym.agent_url: both are given"),
        ({"url": "10.0.0.7:8000"}, "should be http://HOST:PORT"),
        ({"url": "http://user:password@a"}, "without a user"),
    ],
)
def test_one_server_is_named_by_a_url_without_secrets(tmp_path: Path, gym: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(tmp_path, [row()], **gym)


def test_rows_without_a_task_and_bad_rows_of_all_sources_are_told_at_once(tmp_path: Path) -> None:
    config = configured(tmp_path, [row()], url="http://127.0.0.1:1")
    (tmp_path / "rows.jsonl").write_text("\n" + lines([{}]))
    other = tmp_path / "empty.jsonl"
    other.write_text("\n")
    data = {"train": {"data_path": str(tmp_path / "rows.jsonl")}, "validation": {"data_path": str(other)}}
    message = refusal(TrainConfig.model_validate({"env": config.env, "policy": config.policy, "data": data}))
    assert [line.rpartition("/")[2][:24] for line in message.splitlines()] == [
        "rows.jsonl:2: the key 'r",
        "empty.jsonl: holds no ta",
    ]
