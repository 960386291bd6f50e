"""Episodes that an agent server of NeMo Gym plays, with the policy over HTTP, and what it tells of their tokens."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from slurmkit.config.data import GymEnv
from slurmkit.envs.environment import Agent, Played, PolicyCall, Score, Task
from slurmkit.envs.gym.client import Cookies, GymClient, GymError, reward_of
from slurmkit.envs.gym.rows import messages_of, row_of

_TOKENS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")


class GymAgent(Agent):
    """One episode: POST /run with the row, as the run samples. GymError where the server fails.

    Each item of its output that ends a reply of the policy carries the reply's tokens, as Gym's model server adds them
    with `return_token_id_information: true`.
    """

    def __init__(
        self,
        config: GymEnv,
        client: GymClient,
        sampling: Mapping[str, float],
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._config = config
        self._client = client
        self._sampling = sampling
        self._ready = ready

    async def ready(self) -> None:
        await self._ready()

    async def run(self, task: Task) -> Played:
        row = row_of(task.answer)
        params = {**row.body["responses_create_params"], **self._sampling}
        url = f"{self._config.agent_url}/run"
        body = json.dumps({**row.body, "responses_create_params": params})
        # Never sent again once it may have begun: repeating what failed would favour the episodes that do not fail.
        answer = await self._client.post(url, body, Cookies({}), deadline=self._client.deadline())
        reward = reward_of(answer)
        response = answer.json.get("response")
        items = response.get("output") if isinstance(response, dict) else None
        if not isinstance(response, dict) or not isinstance(items, list):
            raise answer.error("no response.output")
        found = [(item, f"{answer.request}: response.output.{n}") for n, item in enumerate(items) if type(item) is dict]
        has_tokens = [each for each in found if any(each[0].get(key) is not None for key in _TOKENS)]
        calls = tuple(_policy_call(item, place) for item, place in has_tokens)
        if not calls:
            raise GymError(
                f"{answer.request} was answered with {len(items)} items and no tokens of the policy's: its model "
                "server needs return_token_id_information: true"
            )
        return Played(
            calls,
            (*row.messages, *messages_of(items)),
            sum(item.get("type") == "function_call" for item, _ in found),
            Score(reward, correct=reward >= self._config.correct_reward),
            is_cut=bool(response.get("incomplete_details")),
        )


def _policy_call(item: Mapping[str, Any], place: str) -> PolicyCall:
    for key in _TOKENS:
        found, kinds = item.get(key), {int, float} if key == "generation_log_probs" else {int}
        if not isinstance(found, list) or not found or {type(each) for each in found} - kinds:
            raise GymError(f"{place}.{key} must be a list of numbers, found {json.dumps(found)[:80]}")
    prompt_ids, token_ids, logprobs = (tuple(item[key]) for key in _TOKENS)
    if len(token_ids) != len(logprobs):
        raise GymError(f"{place} has {len(token_ids)} generation_token_ids and {len(logprobs)} generation_log_probs")
    return PolicyCall(prompt_ids, token_ids, logprobs)
