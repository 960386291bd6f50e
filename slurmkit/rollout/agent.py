"""Episodes that somebody else's agent plays: from its calls of the policy to turns, token-exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy

from slurmkit.envs.environment import Agent, PolicyCall, Task
from slurmkit.errors import UserError
from slurmkit.generation.engine import Completion
from slurmkit.rollout.boundary import asked
from slurmkit.rollout.contract import check_played
from slurmkit.rollout.episode import Episode, Turn


async def run_agent(
    task: Task, agent: Agent, *, temperature: float, weight_version: int, timeout_seconds: float
) -> Episode:
    """Have one episode played.

    `weight_version` is that of the weights when it begins: all tokens are taken to be so old, as what an agent tells
    does not say how new they are. Raises BrokenEnvironment, which names the task, if the agent raises, takes longer
    than `timeout_seconds`, or returns a value against its contract. Raises UserError if there is no agent.
    """
    await asked(agent.ready, lambda _: None, task, agent, None, passes=(UserError,))
    played = await asked(partial(agent.run, task), check_played, task, agent, timeout_seconds)
    return Episode(
        task,
        prompt_ids=played.calls[0].prompt_ids,
        turns=tuple(_turns(played.calls, weight_version, is_cut=played.is_cut)),
        temperature=temperature,
        score=played.score,
        finish_reason="length" if played.is_cut else "stop",
        messages=played.messages,
        num_tool_calls=played.num_tool_calls,
    )


def _turns(calls: Sequence[PolicyCall], weight_version: int, *, is_cut: bool) -> Iterator[Turn]:
    """A sample goes on as long as each prompt begins with all of its tokens, and else another one begins."""
    tokens: tuple[int, ...] = ()
    for call in calls:
        is_last = call is calls[-1]
        goes_on = bool(tokens) and len(call.prompt_ids) > len(tokens) and call.prompt_ids[: len(tokens)] == tokens
        completion = Completion(
            token_ids=numpy.array(call.token_ids, numpy.int32),
            logprobs=numpy.array(call.logprobs, numpy.float32),
            text="",  # what it says is in the messages
            finish_reason="length" if is_cut and is_last else "stop",
            weight_versions=numpy.full(len(call.token_ids), weight_version, numpy.int32),
        )
        yield Turn(call.prompt_ids[len(tokens) :] if goes_on else call.prompt_ids, completion, not goes_on)
        tokens = (*call.prompt_ids, *call.token_ids)
