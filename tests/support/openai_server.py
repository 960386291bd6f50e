"""A server that speaks OpenAI's chat completions and answers BFCL's questions as it is told to."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "key-of-the-test"
Call = tuple[str, dict[str, Any]]
# What is asked for, and whether a tool has just answered; the calls of the reply, or its text.
Answer = Callable[[str, bool], list[Call] | str]


def answers(data: Path, *categories: str) -> Answer:
    """Right answers, from the possible ones that bfcl-eval has in `data`."""
    known: dict[str, Any] = {}
    for category in categories:
        questions, truths = (
            [json.loads(line) for line in (folder / f"BFCL_v4_{category}.json").read_text().splitlines()]
            for folder in (data, data / "possible_answer")
        )
        for entry, truth in zip(questions, truths, strict=True):
            turns = truth["ground_truth"] if category.startswith("multi_turn") else [truth["ground_truth"]]
            for messages, calls in zip(entry["question"], turns, strict=True):
                known[messages[-1]["content"]] = calls

    def answer(question: str, is_after_a_tool: bool) -> list[Call] | str:
        return "Done." if is_after_a_tool else [_call(call) for call in known[question]]

    return answer


def _call(truth: str | dict[str, Any]) -> Call:
    if isinstance(truth, str):
        call: Any = ast.parse(truth, mode="eval").body
        assert not call.args, "which parameter this is, is not said here"
        return call.func.id, {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    [(name, parameters)] = truth.items()
    return name.replace(".", "_"), {key: values[0] for key, values in parameters.items() if values and values[0] != ""}


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its base URL, and what it has been asked so far. An answer that raises is the server's error 500."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            try:
                assert self.headers["Authorization"] == f"Bearer {KEY}"
                last = body["messages"][-1]
                question = [each["content"] for each in body["messages"] if each["role"] == "user"][-1]
                self._reply(200, _completion(answer(question, last["role"] == "tool"), body["model"]))
            except Exception as error:
                self._reply(400, {"error": {"message": repr(error)}})

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _completion(reply: list[Call] | str, model: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply if isinstance(reply, str) else None}
    if not isinstance(reply, str):
        message["tool_calls"] = [
            {"id": f"call_{place}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for place, (name, arguments) in enumerate(reply)
        ]
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}
