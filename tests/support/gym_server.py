"""A small server that speaks NeMo Gym's protocol of resources servers, and fails where a row tells it to.

Its rows ask for a sum: the tool `add` adds to the session's counter, and the judgement compares that with `expected`.
A row's `faults` name what goes wrong, point by point, one for each request that comes there:
{"verify": ["drop", "busy"]}. What is not told is done right.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from aiohttp import web

TOOLS = [
    {
        "type": "function",
        "name": name,
        "description": "Adds to the counter.",
        "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
        "strict": False,
    }
    for name in ("add", "gone")  # the server does not have the second
]


def row(number: int = 0, expected: int = 7, **faults: list[str]) -> dict[str, Any]:
    """A row of this server's. The faults are those of the points seed_session, add and verify."""
    said = [{"role": "system", "content": "Use add."}, {"role": "user", "content": f"Make it {expected} ({number})."}]
    return {
        "id": number,
        "responses_create_params": {"input": said, "tools": TOOLS, "parallel_tool_calls": False},
        "expected": expected,
        "faults": faults,
    }


class GymServer:
    """`url` is where it listens; `requests` are the (path, session) that came, `judged` the bodies of /verify."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.judged: list[dict[str, Any]] = []
        self.in_flight, self.most_in_flight = 0, 0
        self._counters: dict[str, int] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._told: Counter[tuple[int, str]] = Counter()
        self._numbers = count()
        self.url = ""

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/seed_session", self._seed_session)
        app.router.add_post("/add", self._add)
        app.router.add_post("/verify", self._verify)
        return app

    async def _seed_session(self, request: web.Request) -> web.StreamResponse:
        session = f"session.{next(self._numbers)}/="  # what a signature may hold
        self._rows[session] = await request.json()

        def begin() -> dict[str, Any]:
            self._counters[session] = 0
            return {}

        answer = await self._answer(request, session, begin)
        answer.set_cookie("gym", session)
        return answer

    async def _add(self, request: web.Request) -> web.StreamResponse:
        session, number = request.cookies.get("gym", ""), (await request.json()).get("number")
        if session not in self._counters:
            return web.json_response({"detail": "Session not initialized."}, status=400)
        if not isinstance(number, int):
            return web.json_response({"detail": [{"loc": ["body", "number"], "msg": "not an integer"}]}, status=422)

        def add() -> dict[str, Any]:
            self._counters[session] += number
            return {"output": self._counters[session]}

        return await self._answer(request, session, add)

    async def _verify(self, request: web.Request) -> web.StreamResponse:
        asked, session = await request.json(), request.cookies.get("gym", "")

        def judge() -> dict[str, Any]:
            self.judged.append(asked)
            # Once: a second judgement finds no session, as with servers that free theirs.
            return {**asked, "reward": float(self._counters.pop(session, None) == asked["expected"])}

        return await self._answer(request, session, judge)

    async def _answer(
        self, request: web.Request, session: str, act: Callable[[], dict[str, Any]]
    ) -> web.StreamResponse:
        self.requests.append((request.path, session))
        fault = self._fault(request.path, session)
        if fault == "busy":
            return web.json_response({"detail": "busy"}, status=429)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._said(request, fault, act())
        finally:
            self.in_flight -= 1

    def _fault(self, path: str, session: str) -> str:
        asked, point = self._rows.get(session, {}), path[1:]
        faults = asked.get("faults", {}).get(point, [])
        told = self._told[asked.get("id", -1), point]
        self._told[asked.get("id", -1), point] += 1
        return faults[told] if told < len(faults) else ""

    async def _said(self, request: web.Request, fault: str, right: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        match fault:
            case "":
                return web.json_response(right)
            case "error":
                return web.json_response("ValueError('boom')", status=500)
            case "drop":
                request.transport.abort()
            case "no http":
                request.transport.write(b"\x00\x01 this is no HTTP \xff\r\n\r\n")
                request.transport.close()
            case "no json":
                return web.Response(text='{"reward": 1.0', content_type="application/json")
            case "no text":
                return web.Response(body=b"\xff\xfe", content_type="text/plain")
            case "page":
                return web.Response(text="<html>Sign in</html>", content_type="text/html")
            case "elsewhere":
                return web.Response(status=307, headers={"Location": "/add"})
            case "in a moment":
                await asyncio.sleep(0.2)
                return web.json_response(right)
            case "in drops":
                answer = web.StreamResponse(headers={"Content-Type": "application/json"})
                await answer.prepare(request)
                for _ in range(1000):
                    await answer.write(b" ")
                    await asyncio.sleep(0.05)
                return answer
            case "never":
                await asyncio.sleep(3600)
            case "huge":
                return web.json_response({"output": "x" * 10_000_000})
            case "NaN" | "Infinity" | "1e200":
                return web.Response(text=f'{{"reward": {fault}}}', content_type="application/json")
            case "no reward":
                return web.json_response({"score": 1.0})
            case "text":
                return web.json_response({**right, "reward": "1.0"})
            case "true":
                return web.json_response({**right, "reward": True})
            case "no judge":
                failure = {"_ng_failure_class": "judge_failed", "_ng_failure_judge_error": "401"}
                return web.json_response({**right, "reward": 0.0, **failure})
            case _:
                raise ValueError(f"no such fault: {fault!r}")
        return web.Response()


@contextmanager
def serving(application: web.Application) -> Iterator[str]:
    """The application on a free port of this machine, in a thread of its own; its URL."""
    loop, ready, url = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
        await site.start()
        url.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield url[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@contextmanager
def gym_server() -> Iterator[GymServer]:
    server = GymServer()
    with serving(server.application()) as server.url:
        yield server


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(each) + "\n" for each in rows)
