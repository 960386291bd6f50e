"""What ends an episode: turns, tokens, seconds; and what becomes of calls that cannot be made."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from slurmkit.envs.environment import Message, Opening, Task
from slurmkit.generation.engine import SamplingParams
from slurmkit.grpo.credit import make_samples
from slurmkit.grpo.selection import score_metrics
from slurmkit.rollout.boundary import BrokenEnvironment
from slurmkit.rollout.episode import run_episode
from tests.support.conversations import PLENTY, Engine, Scripted, Talk, make_talk, play, tool
from tests.support.groups import of

OPENING = Opening((Message("user", "hello"),), (tool("look"), tool("write")))
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    return make_talk(tmp_path_factory.mktemp("talk"), "qwen3")


def seen(text: str = "seen") -> list[Message]:
    return [Message("tool", text, tool_call_id="call_0", name="look")]


def test_the_last_allowed_reply_still_acts_and_ends_the_episode(talk: Talk) -> None:
    engine, environment = Engine(talk, [CALL] * 5), Scripted(OPENING, [seen()] * 5)
    episode = play(talk, engine, environment, replace(PLENTY, max_turns=3))
    assert (episode.finish_reason, len(episode.turns), len(environment.heard)) == ("max_turns", 3, 3)
    assert environment.scored == 1
    metrics = score_metrics("train", [episode])
    assert (metrics["train:max_turns_reached"], metrics["train:turns_mean"]) == (1, 3)
    assert metrics["train:tool_calls_mean"] == 3


def test_nothing_follows_a_reply_that_was_cut_and_its_calls_are_not_made(talk: Talk) -> None:
    engine, environment = Engine(talk, [CALL, CALL], cut=[1]), Scripted(OPENING, [seen()] * 5)
    episode = play(talk, engine, environment)
    assert (episode.finish_reason, len(episode.turns), environment.scored) == ("length", 2, 1)
    assert environment.heard[1] == Message("assistant", CALL)
    (sample,) = make_samples([of(episode)])
    assert sample.token_ids[-1] == engine.given[1].token_ids[-1]
    assert sample.finish_reason == "length"
    assert score_metrics("val", [episode])["val:truncated_fraction"] == 1


def test_overlong_tool_answers_end_the_episode_and_stay_out_of_its_tokens(talk: Talk) -> None:
    engine, environment = Engine(talk, [CALL, "a"], room=400), Scripted(OPENING, [seen("x" * 500)])
    opening = len(talk.chat.prompt(OPENING).ids)
    engine.room += opening
    episode = play(talk, engine, environment)
    assert (episode.finish_reason, len(episode.turns), environment.scored) == ("length", 1, 1)
    assert episode.sequence_lengths == [opening + episode.num_sampled_tokens]


def test_a_prompt_without_room_is_scored_like_an_empty_reply(talk: Talk) -> None:
    engine, environment = Engine(talk, [CALL], room=5), Scripted(OPENING)
    episode = play(talk, engine, environment)
    assert (episode.finish_reason, episode.turns) == ("prompt_too_long", ())
    assert (environment.heard, environment.scored) == ([Message("assistant", "")], 1)
    assert make_samples([of(episode)]) == []
    assert episode.sequence_lengths == [len(episode.prompt_ids)]
    assert score_metrics("val", [episode])["val:prompts_too_long"] == 1


@pytest.mark.parametrize(("engine_seconds", "environment_seconds"), [(0.2, 0.0), (0.0, 0.2)])
def test_timed_out_episode_keeps_its_turns_and_is_scored(
    talk: Talk, engine_seconds: float, environment_seconds: float
) -> None:
    engine = Engine(talk, [CALL] * 9, seconds=engine_seconds)
    environment = Scripted(OPENING, [seen()] * 9, seconds=environment_seconds)
    episode = play(talk, engine, environment, replace(PLENTY, episode_seconds=0.5))
    assert (episode.finish_reason, environment.scored) == ("timeout", 1)
    assert 1 <= len(episode.turns) < 9
    assert len(make_samples([of(episode)])) == 1
    assert score_metrics("train", [episode])["train:timed_out"] == 1


def test_slow_call_is_a_broken_environment_and_no_episode_timeout(talk: Talk) -> None:
    environment = Scripted(OPENING, [seen()], seconds=1)
    with pytest.raises(BrokenEnvironment, match="task a task: Scripted: TimeoutError"):
        play(talk, Engine(talk, [CALL] * 2), environment, replace(PLENTY, call_seconds=0.05, episode_seconds=30))


def test_an_opening_without_a_message_is_the_environments_fault(talk: Talk) -> None:
    with pytest.raises(BrokenEnvironment, match="task a task: Scripted: an opening without a message"):
        play(talk, Engine(talk, []), Scripted(Opening(())))


def test_a_timeout_of_the_engines_is_their_failure(talk: Talk) -> None:
    class Slow(Engine):
        async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Any:
            raise TimeoutError("an engine hangs")

    with pytest.raises(TimeoutError, match="an engine hangs"):
        play(talk, Slow(talk, []), Scripted(OPENING), replace(PLENTY, episode_seconds=30))


def test_ten_megabytes_of_tool_output_are_cut_early_with_a_note(talk: Talk) -> None:
    engine, environment = Engine(talk, [CALL, "a"]), Scripted(OPENING, [seen("é" * 10_000_000)])
    began = time.process_time()
    episode = play(talk, engine, environment)
    assert time.process_time() - began < 0.5
    written = talk.text(episode.turns[1].added_ids)
    assert written.count("é") == 10_000
    assert "\n[cut here: 9990000 more characters]\n" in written
    assert len(episode.messages[2].content) < 10_100


def test_invalid_tool_calls_are_answered_in_order_and_counted(talk: Talk) -> None:
    broken, unknown = CALL.replace("{}", "{"), CALL.replace("look", "delete")
    engine = Engine(talk, [broken + CALL + unknown, broken, "done"])
    environment = Scripted(OPENING, [[Message("tool", "seen", tool_call_id="call_1", name="look")], ()])
    episode = play(talk, engine, environment)
    # Of the second reply, in which nothing can be made, the environment hears nothing.
    assert [len(message.tool_calls) for message in environment.heard] == [1, 0]
    tools = [message for message in episode.messages if message.role == "tool"]
    assert [message.tool_call_id for message in tools] == ["call_0", "call_1", "call_2", "call_3"]
    assert "not valid JSON" in tools[0].content
    assert tools[1].content == "seen"
    assert 'there is no tool "delete". There are: look, write.' in tools[2].content
    assert "not valid JSON" in talk.text(engine.asked[2][0])
    metrics = score_metrics("val", [episode, episode])
    assert (metrics["val:malformed_tool_calls"], metrics["val:tool_calls_mean"]) == (6, 4)
    assert episode.finish_reason == "stop"


def test_each_turn_has_its_own_seed_derived_from_the_first_seed(talk: Talk) -> None:
    def seeds() -> list[int]:
        engine = Engine(talk, [CALL, CALL, "a"])
        play(talk, engine, Scripted(OPENING, [seen()] * 2))
        return [sampling.seed for _, sampling in engine.asked]

    assert seeds() == seeds()
    assert seeds()[0] == 7  # what a run of one turn draws
    assert len(set(seeds())) == 3


def test_slow_environments_hold_up_nobody_else(talk: Talk) -> None:
    order = list[str]()

    async def one(name: str, seconds: float) -> None:
        environment = Scripted(OPENING, [seen()] * 2, seconds=seconds)
        engine = Engine(talk, [CALL, CALL, "a"])
        await run_episode(Task(name, "?", ""), environment, engine, talk.chat, SamplingParams(1.0, 99, 7), PLENTY)
        order.append(name)

    async def many() -> None:
        await asyncio.gather(*(one("slow", 0.4) for _ in range(2)), *(one("fast", 0.0) for _ in range(60)))

    asyncio.run(many())
    assert order == ["fast"] * 60 + ["slow"] * 2
