"""Episodes with a resources server of NeMo Gym: it has the tools and the judgement, the conversation is held here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from slurmkit.config.data import GymEnv
from slurmkit.envs.environment import Message, Opening, Score, Task, ToolCall
from slurmkit.envs.gym.client import Answer, Cookies, GymClient, reward_of
from slurmkit.envs.gym.response import answer_item, reply_items, response
from slurmkit.envs.gym.rows import Row, row_of


class GymEpisode:
    """One session: POST /seed_session, then one POST for each call of a tool, then POST /verify.

    GymError where the server fails. What a tool refuses (a status from 400 to 499) is its answer, and so is that the
    model called a tool that its task does not have: requests are sent to those alone, never to /verify in a call.
    """

    def __init__(self, config: GymEnv, client: GymClient) -> None:
        self._config = config
        self._client = client
        self._cookies = Cookies({})
        self._output: list[Mapping[str, Any]] = []
        self._row: Row
        self._tools: frozenset[str]

    async def start(self, task: Task) -> Opening:
        self._row = row_of(task.answer)
        self._tools = frozenset(tool.name for tool in self._row.tools)
        # Only this may be repeated without harm: a session that nobody has is no session of this episode.
        seeded = await self._post("/seed_session", task.answer, is_repeatable=True)
        _ = seeded.json
        return Opening(self._row.messages, self._row.tools)

    async def step(self, reply: Message) -> Sequence[Message]:
        self._output += reply_items(reply, len(self._output))
        deadline, answers = self._client.deadline(), []
        for call in reply.tool_calls:
            answer = Message("tool", await self._called(call, deadline), tool_call_id=call.id, name=call.name)
            answers.append(answer)
            self._output.append(answer_item(answer))
        return answers

    async def score(self) -> Score:
        params = self._row.body["responses_create_params"]
        judged = await self._post("/verify", json.dumps({**self._row.body, "response": response(self._output, params)}))
        reward = reward_of(judged)
        return Score(reward, correct=reward >= self._config.correct_reward)

    async def _called(self, call: ToolCall, deadline: float) -> str:
        if call.name not in self._tools:
            there = ", ".join(sorted(self._tools)) or "none"
            return json.dumps({"error": f"there is no tool {call.name!r}; there are: {there}"})
        answer = await self._post(f"/{quote(call.name, safe='')}", call.arguments, deadline=deadline)
        if 300 <= answer.status < 400:
            raise answer.error("a redirection")
        if answer.content_type == "application/json":
            try:
                json.loads(answer.body)
            except (ValueError, RecursionError):
                raise answer.error("what is no JSON") from None
        elif answer.content_type != "text/plain":
            raise answer.error(f"{answer.content_type}, neither JSON nor plain text")
        return answer.text

    async def _post(
        self, path: str, body: str, *, deadline: float | None = None, is_repeatable: bool = False
    ) -> Answer:
        return await self._client.post(
            f"{self._config.url}{path}",
            body,
            self._cookies,
            deadline=deadline or self._client.deadline(),
            is_repeatable=is_repeatable,
        )
