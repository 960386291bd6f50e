"""Episodes that an agent server plays: its tokens become ours exactly, and what it does wrong is named and counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from slurmkit.config.schema import TrainConfig
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Message, Score, ToolCall
from slurmkit.errors import UserError
from slurmkit.grpo.credit import make_samples
from slurmkit.rollout.collect import Group, Sampling, collect
from slurmkit.rollout.episode import Limits
from tests.support.gym_server import TOOLS, lines, serving

SERVED = {"backend": "vllm", "vllm_cfg": {"expose_http_server": True}}


def tokens(prompt: list[int], generated: list[int], logprobs: list[float] | None = None) -> dict[str, Any]:
    found = [-number / 8 for number in generated] if logprobs is None else logprobs
    return {"prompt_token_ids": prompt, "generation_token_ids": generated, "generation_log_probs": found}


def text(said: str, **told: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": said, "annotations": []}]
    return {"type": "message", "role": "assistant", "id": "m", "content": content, **told}


CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"number": 7}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": '{"output": 7}'}


class AgentServer:
    """Answers /run with what each row has as `answer`, with status `status`; `asked` are the bodies that came."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.application = web.Application()
        self.application.router.add_post("/run", self._run)

    async def _run(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        await asyncio.sleep(body.get("seconds", 0))
        return web.Response(
            text=json.dumps({**body, **body["answer"]}), status=body.get("status", 200), content_type="application/json"
        )


def row(
    *items: dict[str, Any], reward: Any = 1.0, response: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    params = {"input": [{"role": "user", "content": "Make it 7."}], "tools": TOOLS, "temperature": 0.2}
    answer = {"reward": reward, "response": response or {"output": list(items)}, **more.pop("also", {})}
    return {"responses_create_params": params, "answer": answer, **more}


@pytest.fixture
def agent() -> Iterator[AgentServer]:
    server = AgentServer()
    with serving(server.application) as server.url:
        yield server


def configured(folder: Path, url: str, *rows: dict[str, Any], **env: Any) -> TrainConfig:
    path = folder / "rows.jsonl"
    path.write_text(lines(list(rows)))
    gym = {"agent_url": url, "start_timeout_seconds": 30.0, **env.pop("gym", {})}
    return TrainConfig.model_validate(
        {
            "env": {"name": "gym", "gym": gym, **env},
            "policy": {"model_name": "x", "generation": {"temperature": 0.5, "max_new_tokens": 9, **SERVED}},
            "data": {"train": {"data_path": str(path)}, "validation": {"data_path": str(path)}},
        }
    )


def groups(config: TrainConfig, *, episodes_per_task: int = 1) -> list[Group]:
    """The episodes of all rows. No engine is asked and nothing is tokenized: that is the agent's."""
    domain = make_domain(config)
    unused: Any = None
    limits = Limits(6, config.env.timeout_seconds, None, 1000)
    return asyncio.run(
        collect(
            domain.train_tasks,
            episodes_per_task=episodes_per_task,
            domain=domain,
            policy=unused,
            chat=unused,
            sampling=Sampling(0.5, 9, (1,)),
            limits=limits,
            weight_version=4,
        )
    )


def test_agent_tokens_enter_the_episode_and_a_new_prompt_starts_a_sample(agent: AgentServer, tmp_path: Path) -> None:
    one = row(
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": None},
        {**CALL, **tokens([1, 2, 3], [4, 5])},
        OUTPUT,
        text("Seven.", **tokens([1, 2, 3, 4, 5, 6, 7], [8])),
        text("Again.", **tokens([1, 2, 9, 4, 5, 6, 7, 8, 6], [5, 8])),
    )
    (group,) = groups(configured(tmp_path, agent.url, one))
    (episode,), samples = group.episodes, make_samples([group])
    assert [sample.token_ids.tolist() for sample in samples] == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [1, 2, 9, 4, 5, 6, 7, 8, 6, 5, 8],
    ]
    assert [sample.loss_mask.tolist() for sample in samples] == [
        [False] * 3 + [True] * 2 + [False] * 2 + [True],
        [False] * 9 + [True] * 2,
    ]
    assert samples[0].logprobs.tolist() == [0, 0, 0, -0.5, -0.625, 0, 0, -1.0]
    assert {sample.weight_version for sample in samples} == {4}
    assert (episode.score, episode.finish_reason, episode.num_tool_calls) == (Score(1.0, True), "stop", 1)
    assert episode.messages == (
        Message("user", "Make it 7."),
        Message("assistant", "", (ToolCall("c1", "add", '{"number": 7}'),)),
        Message("tool", '{"output": 7}', tool_call_id="c1", name="add"),
        *(Message("assistant", "Seven."), Message("assistant", "Again.")),
    )


def test_an_agent_is_sent_the_row_with_the_run_s_own_sampling(agent: AgentServer, tmp_path: Path) -> None:
    one = row(text("7", **tokens([1], [2])), id=3)
    assert groups(configured(tmp_path, agent.url, one))[0].episodes
    params = {**one["responses_create_params"], "temperature": 0.5, "top_p": 1.0, "max_output_tokens": 9}
    assert agent.asked == [{**one, "responses_create_params": params}]


def test_an_agent_s_reply_that_was_cut_counts_as_cut(agent: AgentServer, tmp_path: Path) -> None:
    cut = {"output": [text("7", **tokens([1], [2]))], "incomplete_details": {"reason": "max_output_tokens"}}
    ((episode,),) = (group.episodes for group in groups(configured(tmp_path, agent.url, row(response=cut))))
    assert episode.finish_reason == "length"
    assert episode.turns[-1].completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (row(text("7")), "1 items and no tokens of the policy's: its model server needs return_token_id_information"),
        (row(text("7", **tokens([1], [2], [-1.0, -2.0]))), "1 generation_token_ids and 2 generation_log_probs"),
        (row(text("7", **tokens([1], []))), "output.0.generation_token_ids must be a list of numbers, found []"),
        (row(text("7", prompt_token_ids=[1])), "output.0.generation_token_ids must be a list of numbers, found null"),
        (row(text("7", **tokens([1.5], [2]))), "output.0.prompt_token_ids must be a list of numbers"),
        (row(response={"output": "7"}), "was answered with no response.output: 200"),
        (row(text("7", **tokens([1], [2])), reward=None), "was answered without a reward: reward is null"),
        (row(also={"_ng_failure_class": "judge_failed"}, reward=0.0), "with a failure (judge_failed)"),
        (row(status=500), "was answered with an error: 500"),
        (row(status=422), "was answered with an error: 422"),
        (row(seconds=60), "no whole answer within 4 s (env.timeout_seconds)"),
    ],
)
def test_an_agent_that_fails_breaks_that_episode_alone_once_and_is_named(
    agent: AgentServer, tmp_path: Path, one: dict[str, Any], message: str
) -> None:
    good = row(text("7", **tokens([1], [2])))
    bad, right = groups(configured(tmp_path, agent.url, one, good, timeout_seconds=4.0))
    assert not bad.episodes
    assert "task rows.jsonl:1: GymAgent: GymError: POST " in bad.broken[0]
    assert message in bad.broken[0]
    assert len(right.episodes) == 1
    assert len(agent.asked) == 2


def test_a_missing_agent_ends_the_run_and_a_late_agent_is_waited_for(agent: AgentServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"env.gym.agent_url \S+: GET /run: Cannot connect .* which takes POST /run"):
        groups(configured(tmp_path, "http://127.0.0.1:9", row(), gym={"start_timeout_seconds": 1.0}))
    left = [503]

    @web.middleware
    async def starting(request: web.Request, handler: Any) -> web.StreamResponse:
        return web.Response(status=left.pop()) if left else await handler(request)

    late = AgentServer()
    late.application.middlewares.append(starting)
    with serving(late.application) as url:
        (group,) = groups(configured(tmp_path, url, row(text("7", **tokens([1], [2])))), episodes_per_task=3)
    assert len(group.episodes) == 3
    assert not left


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({}, "set policy.generation.backend to vllm and policy.generation.vllm_cfg.expose_http_server to true"),
        ({"backend": "vllm"}, "expose_http_server to true"),
        ({**SERVED, "top_k": 5}, "top_k 5 cannot be told to an agent"),
    ],
)
def test_an_agent_needs_a_policy_that_it_can_ask(tmp_path: Path, generation: dict[str, Any], message: str) -> None:
    config = configured(tmp_path, "http://127.0.0.1:9", row())
    policy = {"model_name": "x", "generation": generation}
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(
            {"env": config.env, "policy": policy, "data": config.data, "loss_fn": {"force_on_policy_ratio": True}}
        )
