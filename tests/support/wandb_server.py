"""As much of W&B's API as its own client asks for when it uploads a run. It keeps what it was sent."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """`runs`, `artifacts` and `lines` are in the order in which they came."""

    def __init__(self, key: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key = key
        self.runs: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.lines: list[tuple[str, dict[str, Any]]] = []
        """Lines of history, with the run's id."""
        self.files: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL request."""
        if operation == "UpsertBucket":
            self.runs.append(variables)
            project = {"id": "1", "name": variables["project"], "entity": {"id": "1", "name": "somebody"}}
            name = variables["name"]
            bucket = {"id": name, "name": name, "displayName": name, "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "RunResumeStatus":
            return {"model": self._known(variables["name"])}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            self.artifacts.append(variables["input"])
            # As where it has the same already, so that the files themselves need not be sent.
            artifact = {"id": "1", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "1"}}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return {}

    def _known(self, name: str) -> dict[str, Any] | None:
        """What a run has already; None of one that is new."""
        own = [line for run, line in self.lines if run == name]
        if not any(each["name"] == name for each in self.runs):
            return None
        bucket = {
            **{"id": name, "name": name, "displayName": name, "summaryMetrics": "{}", "config": "{}"},
            **{"logLineCount": 0, "historyLineCount": len(own), "eventsLineCount": 0, "eventsTail": "[]"},
            **{"historyTail": json.dumps([json.dumps(line) for line in own[-1:]]), "tags": [], "notes": ""},
            "wandbConfig": "{}",
        }
        return {"id": "1", "name": "sums", "entity": {"id": "1", "name": "somebody"}, "bucket": bucket}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        kind, _, told = self.headers.get("Authorization", "").partition(" ")
        if kind != "Basic" or base64.b64decode(told).decode() != f"api:{self.server.key}":
            self._send(401, {"error": "no such key"})
        elif found := re.fullmatch(r"/files/.*/(\w+)/file_stream", self.path):
            for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                self.server.lines.append((found[1], json.loads(line)))
            self._send(200, {})
        else:
            self._send(200, {"data": self.server.answer(body.get("operationName", ""), body.get("variables") or {})})

    def do_PUT(self) -> None:
        self.server.files.add(self.path.removeprefix("/storage/"))
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, {})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def wandb_server(key: str) -> Iterator[WandbServer]:
    """A server that takes this key alone."""
    with WandbServer(key) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)
