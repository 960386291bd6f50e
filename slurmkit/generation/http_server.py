"""vLLM's own OpenAI-compatible endpoint over a running engine, so that other programs' agents act with the policy."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurmkit.config.model import VllmCfg

SERVED_MODEL_NAME = "policy"
"""What requests call the model."""
WEIGHT_VERSIONS = "x-weight-versions"
"""Header of each response: how many updates the weights had seen when the request came, and when it was answered."""


def make_api_key(folder: Path) -> None:
    """Write a new key that all engines of the run ask for; like the folder, it is for this user alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = folder / ".api_key.unfinished"
    beside.touch(mode=0o600)
    beside.write_text(secrets.token_urlsafe(32) + "\n")
    os.replace(beside, folder / "api_key")


@dataclass(frozen=True, slots=True)
class Serving:
    """That an engine serves: the folder that has the `api_key`, and the name of the file there that says where."""

    folder: Path
    name: str
    chat_template: str | None
    """Its text; None is the model's own."""
    chat_template_kwargs: Mapping[str, Any]
    """Of whoever gives none of its own."""


async def serve(
    llm: Any,
    serving: Serving,
    *,
    model_path: str,
    address: str,
    settings: VllmCfg,
    version: Callable[[], int],
) -> asyncio.Task[None]:
    """Serve on a free port of `address` until the task is cancelled, or its event loop ends, and write where.

    `llm` is an AsyncLLM with a tokenizer; `version` says how many updates its weights have seen.
    Example of NAME.json: {"base_url": "http://10.0.0.7:40123/v1", "model": "policy"}.
    """
    import uvicorn
    from vllm.entrypoints.launchers.launcher import NoSignalServer

    is_ipv6 = ":" in address
    listening = socket.create_server((address, 0), family=socket.AF_INET6 if is_ipv6 else socket.AF_INET)
    app = await _app(llm, model_path, serving, settings, version)
    server = NoSignalServer(uvicorn.Config(app, log_level="error", access_log=False))
    task = asyncio.create_task(server.serve([listening]))
    host, port = f"[{address}]" if is_ipv6 else address, listening.getsockname()[1]
    beside = serving.folder / f".{serving.name}.unfinished"
    beside.write_text(json.dumps({"base_url": f"http://{host}:{port}/v1", "model": SERVED_MODEL_NAME}) + "\n")
    os.replace(beside, serving.folder / f"{serving.name}.json")
    return task


async def _app(llm: Any, model_path: str, serving: Serving, settings: VllmCfg, version: Callable[[], int]) -> Any:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.import_utils import import_from_path

    chat = settings.http_server_serving_chat_kwargs
    if settings.tool_parser_plugin is not None:
        # Not ToolParserManager.import_tool_parser, which logs what the file raises and goes on without it.
        import_from_path("slurmkit_tool_parser_plugin", settings.tool_parser_plugin)
    parser: Any = FlexibleArgumentParser
    arguments = make_arg_parser(parser()).parse_args(["--model", model_path])
    arguments.served_model_name = [SERVED_MODEL_NAME]
    arguments.disable_fastapi_docs = True
    arguments.enable_auto_tool_choice = chat.enable_auto_tools
    arguments.tool_call_parser = chat.tool_parser
    arguments.chat_template = serving.chat_template
    arguments.default_chat_template_kwargs = dict(serving.chat_template_kwargs)
    tasks = await llm.get_supported_tasks()
    app = build_app(arguments, tasks, llm.model_config)
    await init_app_state(llm, app.state, arguments, tasks)

    return _Guard(app, (serving.folder / "api_key").read_text().strip(), version)


class _Guard:
    """Around vLLM's application (ASGI): nothing is answered without the key, and answers tell the versions."""

    def __init__(self, app: Any, api_key: str, version: Callable[[], int]) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()
        self._version = version

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # vLLM's own key leaves some paths open.
        if not secrets.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._expected):
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
            return
        first = self._version()

        async def tell_versions(message: Any) -> None:
            if message["type"] == "http.response.start":
                told = (WEIGHT_VERSIONS.encode(), f"{first},{self._version()}".encode())
                message = {**message, "headers": [*message.get("headers", ()), told]}
            await send(message)

        await self._app(scope, receive, tell_versions)
