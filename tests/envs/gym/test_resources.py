"""Episodes with a resources server over HTTP, and everything that one can do wrong."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.data import GymEnv
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Domain, Environment, Message, Score, Task, ToolCall
from slurmkit.envs.gym.client import GymError
from slurmkit.generation.engine import Completion, SamplingParams
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.collect import Sampling, collect
from slurmkit.rollout.episode import Limits
from tests.support.groups import completion
from tests.support.gym_server import GymServer, gym_server, lines, row
from tests.support.tiny_model import make_tiny_model


@pytest.fixture
def server() -> Iterator[GymServer]:
    with gym_server() as running:
        yield running


def configured(folder: Path, rows: list[dict[str, Any]], seconds: float = 30.0, **gym: Any) -> TrainConfig:
    path = folder / "rows.jsonl"
    path.write_text(lines(rows))
    return TrainConfig.model_validate(
        {
            "env": {"name": "gym", "timeout_seconds": seconds, "gym": gym},
            "policy": {"model_name": "x"},
            "data": {"train": {"data_path": str(path)}, "validation": {"data_path": str(path)}},
        }
    )


def domain(server: GymServer, folder: Path, *rows: dict[str, Any], seconds: float = 30.0, **gym: Any) -> Domain:
    return make_domain(configured(folder, list(rows), seconds, url=server.url, **gym))


def add(number: object = 7, name: str = "add") -> Message:
    return Message("assistant", "", (ToolCall("call_0", name, json.dumps({"number": number})),))


async def play(environment: Environment, task: Task, *replies: Message) -> tuple[list[str], Score]:
    """What the tools said to the replies, and the score."""
    await environment.start(task)
    said = [answer.content for reply in replies for answer in await environment.step(reply)]
    return said, await environment.score()


def played(domain: Domain, *replies: Message, task: int = 0) -> tuple[list[str], Score]:
    return asyncio.run(play(domain.environment(), domain.train_tasks[task], *replies))


def test_an_episode_is_one_session_of_tool_calls_scored_by_the_server(server: GymServer, tmp_path: Path) -> None:
    gym = domain(server, tmp_path, row(expected=7))
    thought = Message("assistant", "<think>\n3 and 4\n</think>\n\nI add.", add(3).tool_calls)
    said, score = played(gym, thought, add(4), Message("assistant", "Done."))
    assert said == ['{"output": 3}', '{"output": 7}']
    assert score == Score(1.0, True)
    assert [path for path, _ in server.requests] == ["/seed_session", "/add", "/add", "/verify"]
    assert len({session for _, session in server.requests}) == 1
    (judged,) = server.judged
    assert {**judged, "response": None} == {**row(expected=7), "response": None}
    output = judged["response"]["output"]
    assert [item["type"] for item in output] == [
        *("reasoning", "message", "function_call", "function_call_output", "function_call", "function_call_output"),
        "message",
    ]
    assert output[0]["summary"] == [{"type": "summary_text", "text": "3 and 4"}]
    assert output[1]["content"][0]["text"].strip() == "I add."
    assert (output[4]["name"], output[4]["arguments"]) == ("add", '{"number": 4}')
    assert output[5] == {"type": "function_call_output", "call_id": "call_0", "output": '{"output": 7}'}
    assert judged["response"]["object"] == "response"


def test_an_episode_starts_with_the_messages_and_chat_tools_of_its_row(server: GymServer, tmp_path: Path) -> None:
    gym = domain(server, tmp_path, row(expected=7))
    opened = [asyncio.run(gym.environment().start(gym.train_tasks[0])) for _ in range(2)]
    assert opened[0].messages == (Message("system", "Use add."), Message("user", "Make it 7 (0)."))
    assert [tool.name for tool in opened[0].tools] == ["add", "gone"]
    assert opened[0].tools[0].definition["function"]["parameters"]["required"] == ["number"]
    assert opened[0] == opened[1], "episodes share their tools, by which prompts are cached"


def test_a_wrong_answer_scores_zero_and_correct_reward_sets_the_threshold(server: GymServer, tmp_path: Path) -> None:
    assert played(domain(server, tmp_path, row()), Message("assistant", "No."))[1] == Score(0.0, False)
    assert played(domain(server, tmp_path, row(), correct_reward=0.0), add(1))[1] == Score(0.0, True)


def test_what_the_model_gets_wrong_is_an_answer_that_it_can_act_on(server: GymServer, tmp_path: Path) -> None:
    wrong = [add(1, "gone"), add(1, "verify"), add(1, "../add"), add("seven")]
    said, score = played(domain(server, tmp_path, row()), *wrong, add(7))
    assert score.reward == 1.0
    assert "404" in said[0]
    assert said[1] == json.dumps({"error": "there is no tool 'verify'; there are: add, gone"})
    assert "there is no tool '../add'" in said[2]
    assert "not an integer" in said[3]
    assert [path for path, _ in server.requests].count("/verify") == 1


@pytest.mark.parametrize(
    ("point", "fault", "message"),
    [
        ("seed_session", "no json", r"POST http\S+/seed_session was answered with what is no JSON: 200"),
        ("seed_session", "no http", r"no whole answer.*\(sent 2 times\)"),
        ("add", "error", r"POST http\S+/add was answered with an error: 500 .*boom"),
        ("add", "drop", r"POST http\S+/add: no whole answer: ServerDisconnectedError"),
        ("add", "no http", r"/add: no whole answer: "),
        ("add", "no json", r"/add was answered with what is no JSON"),
        ("add", "no text", r"/add was answered with what is no text"),
        ("add", "page", r"/add was answered with text/html, neither JSON nor plain text: 200 .*Sign in"),
        ("add", "elsewhere", r"/add was answered with a redirection: 307"),
        ("add", "never", r"/add: no whole answer within 1 s \(env.timeout_seconds\)"),
        ("add", "in drops", r"/add: no whole answer within 1 s \(env.timeout_seconds\)"),
        ("verify", "drop", r"POST http\S+/verify: no whole answer"),
        ("verify", "error", r"/verify was answered with an error: 500"),
        ("verify", "no json", r"/verify was answered with what is no JSON"),
        ("verify", "never", r"/verify: no whole answer within 1 s"),
        ("add", "huge", r"/add was answered with more than 1,000,000 bytes"),
        ("verify", "huge", r"/verify was answered with more than 1,000,000 bytes"),
        ("verify", "NaN", r"/verify was answered with the reward nan, not one from -1e\+09 to 1e\+09"),
        ("verify", "1e200", r"/verify was answered with the reward 1e\+200, not one"),
        ("verify", "Infinity", r"/verify was answered with the reward inf"),
        ("verify", "no reward", r"/verify was answered without a reward: reward is null"),
        ("verify", "text", r'/verify was answered without a reward: reward is "1.0"'),
        ("verify", "true", r"/verify was answered without a reward: reward is true"),
        ("verify", "no judge", r"/verify was answered with a failure \(judge_failed\)"),
    ],
)
def test_a_server_that_fails_breaks_its_episode_and_is_named(
    server: GymServer, tmp_path: Path, point: str, fault: str, message: str
) -> None:
    bad = row(**{point: [fault] * 9})
    seconds = 1 if "within 1 s" in message else 30
    gym = domain(server, tmp_path, bad, seconds=seconds, max_response_bytes=1_000_000, max_retries=1)
    begun = time.monotonic()
    with pytest.raises(GymError, match=message):
        played(gym, add(7))
    assert time.monotonic() - begun < seconds + 5


def test_ten_megabytes_from_a_tool_are_its_answer(server: GymServer, tmp_path: Path) -> None:
    said, score = played(domain(server, tmp_path, row(add=["huge"])), add(7))
    assert len(said[0]) > 10_000_000
    assert score.reward == 1.0


def test_only_what_the_server_cannot_have_done_is_sent_again(server: GymServer, tmp_path: Path) -> None:
    retried = row(seed_session=["error", "drop", "busy"], add=["busy", "busy"], verify=["busy"])
    gym = domain(server, tmp_path, retried, row(1, verify=["error"]), row(2, add=["drop"]))
    _, score = played(gym, add(7))
    assert score.reward == 1.0
    assert [path for path, _ in server.requests] == [*["/seed_session"] * 4, *["/add"] * 3, *["/verify"] * 2]
    assert len({session for path, session in server.requests if path != "/seed_session"}) == 1
    for task in (1, 2):
        before = len(server.requests)
        with pytest.raises(GymError):
            played(gym, add(7), task=task)
        assert len(server.requests) - before == 4 - task, (
            "a judgement or a call that may have been made is not repeated"
        )
    del score


class Adds:
    """An engine whose model calls `add` with 7, and then is done."""

    def __init__(self, chat: Chat) -> None:
        self._call, self._end = (
            chat.reply_ids(text)
            for text in ('<tool_call>\n{"name": "add", "arguments": {"number": 7}}\n</tool_call>', "Done.")
        )

    async def generate(self, prompt_ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        ids = self._end if len(prompt_ids) > len(self._call) else self._call
        return completion(ids, [-0.5] * len(ids))


def test_broken_episodes_are_named_and_left_out_of_their_groups(server: GymServer, tmp_path: Path) -> None:
    faults: list[dict[str, list[str]]] = [{}, {"verify": ["error"]}, {"add": ["drop"]}, {"add": ["huge"]}]
    gym = domain(server, tmp_path, *(row(number, **each) for number, each in enumerate(faults)))
    chat = Chat(make_tiny_model(tmp_path / "model"), tool_parser="hermes")
    groups = asyncio.run(
        collect(
            gym.train_tasks,
            episodes_per_task=2,
            domain=gym,
            policy=Adds(chat),
            chat=chat,
            sampling=Sampling(1.0, 5, (1,)),
            limits=Limits(6, 5.0, None, 1000),
        )
    )
    assert [[episode.score.reward for episode in group.episodes] for group in groups] == [[1, 1], [1], [1], [1, 1]]
    assert [[text[:34] for text in group.broken] for group in groups] == [
        [],
        ["task rows.jsonl:2: GymEpisode: Gym"],
        ["task rows.jsonl:3: GymEpisode: Gym"],
        [],
    ]
    shown = {len(message.content) for episode in groups[3].episodes for message in episode.messages}
    assert max(shown) < 1100, "of ten megabytes the model is shown the beginning"
    assert [message.role for message in groups[0].episodes[0].messages[2:]] == ["assistant", "tool", "assistant"]


def test_a_server_that_does_not_answer_holds_up_no_other_episode(server: GymServer, tmp_path: Path) -> None:
    gym = domain(server, tmp_path, row(0, add=["never"]), row(1), seconds=60)

    async def both() -> tuple[Score, bool]:
        waits, goes_on = (asyncio.create_task(play(gym.environment(), task, add(7))) for task in gym.train_tasks)
        _, score = await goes_on
        is_waiting = not waits.done()
        waits.cancel()
        return score, is_waiting

    assert asyncio.run(both()) == (Score(1.0, True), True)


def test_1024_episodes_keep_separate_sessions_within_max_connections(server: GymServer, tmp_path: Path) -> None:
    rows = [row(number, expected=number, add=["in a moment"]) for number in range(1, 1025)]
    gym = domain(server, tmp_path, *rows, seconds=120, max_connections=256)

    async def all_of_them() -> list[Score]:
        episodes = (play(gym.environment(), task, add(n)) for n, task in enumerate(gym.train_tasks, start=1))
        return [score for _, score in await asyncio.gather(*episodes)]

    scores = asyncio.run(all_of_them())
    assert scores == [Score(1.0, True)] * 1024
    assert 100 < server.most_in_flight <= 256
    assert GymEnv().max_connections == 1024
