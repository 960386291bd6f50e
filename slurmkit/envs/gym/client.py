"""Requests to a NeMo Gym server: how many, how long, how large, and which of them may be sent again."""

from __future__ import annotations

import asyncio
import json
import reprlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp

from slurmkit.config.algorithm import MAX_REWARD
from slurmkit.config.data import GymEnv
from slurmkit.errors import UserError

# uvicorn, which serves all of Gym, closes connections that were idle for 5 s. Who sends on one at that moment cannot
# know whether the request was carried out, so ours are closed before.
_IDLE_SECONDS = 2.0
_CONNECT_SECONDS = 10.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 10.0
# A deadline ends a little before that of whoever waits for the environment, so that the message can name the request.
_EARLIER = 0.98
_REFUSED = (429, 503)  # said before anything was done (RFC 6585, RFC 9110)


class GymError(Exception):
    """The server failed: the request, and what came instead of an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `request` names what it answers, as "POST http://10.0.0.7:8000/verify"."""

    request: str
    status: int
    content_type: str
    body: bytes

    @property
    def text(self) -> str:
        """The body. GymError where it is no text."""
        try:
            return self.body.decode()
        except UnicodeDecodeError:
            raise self.error("what is no text") from None

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object that a request that was carried out is answered by; GymError for anything else."""
        if self.status != 200:
            raise self.error("an error")
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            raise self.error("what is no JSON") from None
        if not isinstance(found, dict):
            raise self.error("no JSON object")
        return found

    def error(self, what: str) -> GymError:
        """That the answer was `what`, with its beginning."""
        return GymError(f"{self.request} was answered with {what}: {self.status} {self.body[:200]!r}")


@dataclass(slots=True)
class Cookies:
    """What the server has set in one episode: how it knows its session."""

    header: dict[str, str]

    def take(self, response: aiohttp.ClientResponse) -> None:
        # As the server wrote them: a signature does not survive other quoting.
        self.header |= {name: morsel.coded_value for name, morsel in response.cookies.items()}

    def headers(self) -> dict[str, str]:
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self.header.items())} if self.header else {}


class GymClient:
    """One pool of connections for all episodes of a domain."""

    def __init__(self, config: GymEnv, *, timeout_seconds: float, seed: int) -> None:
        """`timeout_seconds` is what an environment may take in all over one call."""
        self._config = config
        self._timeout = timeout_seconds
        self._rng = Random(f"gym {seed}")
        self._loop: asyncio.AbstractEventLoop | None = None

    def deadline(self) -> float:
        """Until when what begins now must be done, in the event loop's time."""
        return asyncio.get_running_loop().time() + self._timeout * _EARLIER

    async def post(
        self,
        url: str,
        body: str,
        cookies: Cookies,
        *,
        deadline: float,
        is_repeatable: bool = False,
    ) -> Answer:
        """What the server answers to `body`, which is JSON, whatever it is below status 500.

        A request is sent again where the server cannot have carried it out: where there was no connection, or it was
        refused with 429 or 503. One that `is_repeatable` is also sent again after other failures. GymError after that.
        """
        request = f"POST {url}"
        data = body.encode()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._persistently(request, url, data, cookies, is_repeatable)
        except TimeoutError:
            raise GymError(
                f"{request}: no whole answer within {self._timeout:g} s (env.timeout_seconds) of the call it is part of"
            ) from None

    async def _persistently(self, request: str, url: str, data: bytes, cookies: Cookies, is_repeatable: bool) -> Answer:
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                longest = min(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS)
                await asyncio.sleep(longest * self._rng.uniform(0.5, 1))
            try:
                answer = await self._once(request, url, data, cookies)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                problem = GymError(f"{request}: no connection: {error}")
                continue
            except (aiohttp.ClientError, OSError) as error:
                problem = GymError(f"{request}: no whole answer: {type(error).__name__}: {error}")
                if is_repeatable:
                    continue
                raise problem from error
            if answer.status not in _REFUSED and answer.status < 500:
                return answer
            problem = answer.error("an error")
            if answer.status not in _REFUSED and not is_repeatable:
                raise problem
        raise GymError(f"{problem} (sent {self._config.max_retries + 1} times)")

    async def _once(self, request: str, url: str, data: bytes, cookies: Cookies) -> Answer:
        session, headers = await self._session(), {"Content-Type": "application/json", **cookies.headers()}
        async with session.post(url, data=data, headers=headers, allow_redirects=False) as response:
            body = bytearray()
            async for part in response.content.iter_chunked(1 << 16):
                body += part
                if len(body) > self._config.max_response_bytes:
                    response.close()
                    most = f"{self._config.max_response_bytes:,} bytes (env.gym.max_response_bytes)"
                    raise GymError(f"{request} was answered with more than {most}")
            cookies.take(response)
            return Answer(request, response.status, response.content_type, bytes(body))

    async def check(self, key: str, paths: tuple[str, ...], what: str) -> None:
        """UserError unless the server at the URL of env.gym's `key` takes POST at all `paths`, as `what` does.

        Asked with GET, which must be answered that it is the wrong method (405): so nothing is begun there.
        """
        base = getattr(self._config, key)
        session, loop = await self._session(), asyncio.get_running_loop()
        end = loop.time() + self._config.start_timeout_seconds
        for path in paths:
            while True:
                try:
                    async with asyncio.timeout_at(end):
                        async with session.get(base + path, allow_redirects=False) as response:
                            status, found = response.status, f"GET {path} was answered with {response.status}, not 405"
                except TimeoutError:
                    status, found = 0, f"GET {path} was not answered in time"
                except (aiohttp.ClientError, OSError) as error:
                    status, found = 0, f"GET {path}: {error}"
                if status == 405:
                    break
                if loop.time() + _FIRST_WAIT_SECONDS >= end or 0 < status < 500:
                    takes = " and ".join(f"POST {path}" for path in paths)
                    waited = "" if status else f", for {self._config.start_timeout_seconds:g} s (start_timeout_seconds)"
                    raise UserError(f"env.gym.{key} {base}: {found}{waited}. It must be {what}, which takes {takes}")
                await asyncio.sleep(_FIRST_WAIT_SECONDS)

    async def _session(self) -> aiohttp.ClientSession:
        """The running event loop's session."""
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._opened = loop, _opened(self._config.max_connections)
            self._current = await anext(self._opened)
        return self._current


async def _opened(max_connections: int) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that is closed where its event loop ends, as that closes the generators that it has begun."""
    connector = aiohttp.TCPConnector(limit=max_connections, keepalive_timeout=_IDLE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        yield session


def reward_of(answer: Answer) -> float:
    """The reward in a judgement. GymError where there is none, or the judging failed."""
    found = answer.json
    if (failure := found.get("_ng_failure_class")) is not None:
        # A judge that could not be asked is answered for with a reward of 0, which says nothing of the policy.
        raise answer.error(f"a failure ({failure})")
    reward = found.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise GymError(f"{answer.request} was answered without a reward: reward is {json.dumps(reward)[:80]}")
    if not -MAX_REWARD <= reward <= MAX_REWARD:
        most = f"{-MAX_REWARD:g} to {MAX_REWARD:g}"
        raise GymError(f"{answer.request} was answered with the reward {reprlib.repr(reward)}, not one from {most}")
    return float(reward)
