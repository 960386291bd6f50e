"""What an environment or an agent does wrong: it breaks its own episode, by name, and nothing else."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

import numpy
import pytest

from slurmkit.envs.environment import (
    Agent,
    Environment,
    Message,
    Opening,
    Played,
    PolicyCall,
    Score,
    Task,
    TaskSource,
    Tool,
    ToolCall,
)
from slurmkit.errors import UserError
from slurmkit.rollout.collect import Group, Sampling, collect
from tests.support.conversations import PLENTY, Engine, Talk, make_talk, tool

HALF = "\ud83d"
OPENING = Opening((Message("user", "hello"),), (tool("look"),))
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
ANSWER = Message("tool", "seen", tool_call_id="call_0", name="look")
CALLED = Message("assistant", "", (ToolCall("a", "look", "{}"),))
CALLS = (PolicyCall((1, 2), (3, 4), (-0.5, float("nan"))),)
PLAYED = Played(CALLS, (Message("user", "hello"),), 0, Score(1.0, True), False)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    return make_talk(tmp_path_factory.mktemp("talk"), "qwen3")


class Own:
    """An environment, one of whose methods does what the test says."""

    def __init__(self, **does: Callable[[], Any]) -> None:
        self.does = does

    async def start(self, task: Task) -> Any:
        return self.does.get("start", lambda: OPENING)()

    async def step(self, reply: Message) -> Any:
        return self.does.get("step", lambda: [ANSWER] if reply.tool_calls else [])()

    async def score(self) -> Any:
        found = self.does.get("score", lambda: Score(1.0, True))()
        return await found if asyncio.iscoroutine(found) else found


class OwnAgent(Agent):
    def __init__(self, played: Any = PLAYED, ready: Exception | None = None) -> None:
        self.played = played
        self.is_ready = ready

    async def ready(self) -> None:
        if self.is_ready is not None:
            raise self.is_ready

    async def run(self, task: Task) -> Any:
        return self.played


class Environments:
    """A domain of one task with the environments of a test, one for each episode."""

    def __init__(self, *made: Any) -> None:
        self.train_tasks = self.validation_tasks = [Task("rows.jsonl:7", "?", "")]
        self.train_sources = [TaskSource(self.train_tasks, 1.0)]
        self._made = iter(made)

    def environment(self) -> Environment | Agent:
        made = next(self._made)
        if isinstance(made, Exception):
            raise made
        return made  # type: ignore[no-any-return]

    def demonstrate(self, task: Task, rng: Random) -> str:
        return ""


async def played(talk: Talk, *made: Any) -> Group:
    """The group of episodes with these environments."""
    domain = Environments(*made)
    (group,) = await collect(
        domain.train_tasks,
        episodes_per_task=len(made),
        domain=domain,
        policy=Patient(talk, []),
        chat=talk.chat,
        sampling=Sampling(1.0, 99, (1,)),
        limits=replace(PLENTY, call_seconds=30),
    )
    return group


class Patient(Engine):
    """Calls a tool first, and is done when that is answered."""

    async def generate(self, prompt_ids: tuple[int, ...], sampling: Any) -> Any:
        self.replies.append("done" if "tool_response" in self.talk.text(prompt_ids) else CALL)
        return await super().generate(prompt_ids, sampling)


def returns(value: Any) -> Callable[[], Any]:
    return lambda: value


def tools(definition: Any) -> Opening:
    return replace(OPENING, tools=(Tool(definition),))


def raises(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


FAULTS = [
    ("start", returns("hello"), "start must return an Opening, found 'hello' (str)"),
    ("start", returns(Opening("hello")), "start: messages must be a list or a tuple, found 'hello' (str)"),  # type: ignore[arg-type]
    ("start", returns(Opening(())), "an opening without a message"),
    ("start", returns(Opening((Message("user", HALF),))), "start: messages[0].content must be text without half of"),
    ("start", returns(replace(OPENING, tools=("look",))), "start: tools[0] must be a Tool, found 'look' (str)"),
    ("start", returns(tools({"function": {}})), "start: a tool's definition must have a function.name"),
    ("start", returns(tools({"function": {"name": "a", "b": {1}}})), "the tool 'a' cannot be written as JSON: Object"),
    (
        "start",
        returns(tools({"function": {"name": "a", "b": HALF}})),
        "cannot be written as JSON: 'utf-8' codec",
    ),
    ("step", returns("seen"), "step: messages must be a list or a tuple, found 'seen' (str)"),
    ("step", returns(["seen"]), "step: messages[0] must be a Message, found 'seen' (str)"),
    ("step", returns([{"role": "tool"}]), "step: messages[0] must be a Message, found {'role': 'tool'} (dict)"),
    ("step", returns([replace(ANSWER, content=None)]), "messages[0].content must be text, found None (NoneType)"),
    ("step", returns([ANSWER, replace(ANSWER, content=f"a {HALF}")]), "messages[1].content must be text without half"),
    ("step", returns([replace(ANSWER, role="robot")]), "messages[0].role must be one of system, user, assistant, tool"),
    ("step", returns([replace(ANSWER, name=7)]), "messages[0].name must be text, found 7 (int)"),
    ("step", returns([replace(CALLED, tool_calls=("look",))]), "messages[0].tool_calls[0] must be a ToolCall"),
    ("step", returns([replace(CALLED, tool_calls=(ToolCall("a", "look", "{"),))]), "must be a JSON object as text"),
    ("step", raises(asyncio.CancelledError()), "CancelledError: "),
    ("step", raises(SystemExit(0)), "SystemExit: 0"),
    ("score", returns(None), "score must return a Score, found None (NoneType)"),
    ("score", returns(1.0), "score must return a Score, found 1.0 (float)"),
    *(
        ("score", returns(Score(reward, True)), f"score: reward must be a number from -1e+09 to 1e+09, found {shown}")
        for reward, shown in [
            (None, "None (NoneType)"),
            ("1", "'1' (str)"),
            (True, "True (bool)"),
            (float("nan"), "nan (float)"),
            (float("-inf"), "-inf (float)"),
            (1e200, "1e+200 (float)"),
            (-1_000_000_001, "-1000000001 (int)"),
            (10**400, "1000"),
        ]
    ),
    ("score", returns(Score(1.0, "yes")), "score: correct must be True or False, found 'yes' (str)"),  # type: ignore[arg-type]
    ("score", returns(Score(1.0, True, [])), "score: counts must be a mapping"),  # type: ignore[arg-type]
    ("score", returns(Score(1.0, True, {"calls": None})), "score: calls must be a number"),  # type: ignore[dict-item]
    ("score", returns(Score(1.0, True, {1: 1.0})), "score: a name in counts must be text, found 1 (int)"),  # type: ignore[dict-item]
    ("score", raises(asyncio.CancelledError()), "CancelledError: "),
    ("score", raises(ValueError(HALF)), r"ValueError: \ud83d"),
    ("score", raises(ValueError("a" * 10_000_000)), "ValueError: aaa"),
]


@pytest.mark.parametrize(("method", "does", "problem"), FAULTS, ids=[f"{m} {n}" for n, (m, _, _) in enumerate(FAULTS)])
def test_a_faulty_environment_breaks_its_episode_and_is_named(
    talk: Talk, method: str, does: Callable[[], Any], problem: str
) -> None:
    group = asyncio.run(played(talk, Own(), Own(**{method: does}), Own()))
    assert [episode.score for episode in group.episodes] == [Score(1.0, True)] * 2
    (text,) = group.broken
    assert text.startswith("task rows.jsonl:7: Own: ")
    assert problem in text
    assert len(text.encode()) < 1000


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"calls": ()}, "run: calls must have at least one call of the policy"),
        ({"calls": ("a",)}, "run: calls[0] must be a PolicyCall"),
        ({"calls": (PolicyCall((), (3,), (-0.5,)),)}, "calls[0].prompt_ids must be a tuple of one or more token ids"),
        ({"calls": (PolicyCall((1,), (2**31,), (-0.5,)),)}, "calls[0].token_ids must be a tuple of one or more token"),
        ({"calls": (PolicyCall((1,), (-1,), (-0.5,)),)}, "calls[0].token_ids must be a tuple of one or more token ids"),
        ({"calls": (PolicyCall((1,), (3.0,), (-0.5,)),)}, "calls[0].token_ids must be a tuple of one or more token"),  # type: ignore[arg-type]
        ({"calls": (PolicyCall((1,), (3,), (None,)),)}, "calls[0].logprobs must be a tuple of one or more numbers"),  # type: ignore[arg-type]
        ({"calls": (PolicyCall((1,), (3,), (-0.5, -0.5)),)}, "calls[0] has 1 token_ids and 2 logprobs"),
        ({"messages": (Message("user", HALF),)}, "run: messages[0].content must be text without half"),
        ({"num_tool_calls": None}, "run: num_tool_calls must be a whole number"),
        ({"score": Score(1e200, True)}, "score: reward must be a number from -1e+09 to 1e+09, found 1e+200"),
        ({"is_cut": "no"}, "run: is_cut must be True or False"),
    ],
)
def test_a_faulty_agent_breaks_its_episode_and_is_named(talk: Talk, change: dict[str, Any], problem: str) -> None:
    group = asyncio.run(played(talk, OwnAgent(), OwnAgent(replace(PLAYED, **change))))
    assert [episode.score.reward for episode in group.episodes] == [1.0]
    assert group.broken[0].startswith("task rows.jsonl:7: OwnAgent: ")
    assert problem in group.broken[0]


def test_an_agent_that_is_not_ready_ends_the_run_only_by_a_user_error(talk: Talk) -> None:
    group = asyncio.run(played(talk, OwnAgent(), OwnAgent(ready=OSError("gone"))))
    assert group.broken == ("task rows.jsonl:7: OwnAgent: OSError: gone",)
    with pytest.raises(UserError, match="no agent there"):
        asyncio.run(played(talk, OwnAgent(ready=UserError("no agent there"))))


def test_an_environment_that_cannot_be_made_breaks_its_episode(talk: Talk) -> None:
    group = asyncio.run(played(talk, Own(), OSError("no sandbox")))
    assert group.broken == ("task rows.jsonl:7: Environments: OSError: no sandbox",)


def test_methods_that_are_no_coroutines_break_their_episode(talk: Talk) -> None:
    plain, failing = Own(), Own()
    plain.score = lambda: Score(1.0, True)  # type: ignore[method-assign,assignment,return-value]
    failing.score = raises(ValueError("at once"))  # type: ignore[method-assign]
    group = asyncio.run(played(talk, plain, failing))
    assert group.broken == (
        "task rows.jsonl:7: Own: its methods must be coroutines (async def), one returned Score",
        "task rows.jsonl:7: Own: ValueError: at once",
    )


def test_numbers_of_numpy_are_numbers_and_lists_are_sequences(talk: Talk) -> None:
    score = Score(numpy.float32(0.5), numpy.bool_(True), {"calls": numpy.int64(3)})  # type: ignore[arg-type,dict-item]
    opening = Opening([Message("user", "hello")], [tool("look")])  # type: ignore[arg-type]
    (episode,) = asyncio.run(played(talk, Own(start=returns(opening), score=returns(score)))).episodes
    assert episode.score == Score(0.5, True, {"calls": 3.0})
    assert {type(episode.score.reward), *map(type, episode.score.counts.values())} == {float}


def swallowing(as_what: Callable[[], Any]) -> Callable[[], Any]:
    async def judge() -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return as_what()

    return judge


@pytest.mark.parametrize(
    "judge",
    [
        lambda: asyncio.sleep(60),
        swallowing(returns(Score(1.0, True))),
        swallowing(raises(ValueError("interrupted"))),
    ],
    ids=["waits", "answers all the same", "raises another error"],
)
def test_a_cancelled_rollout_ends_whatever_its_environment_does(talk: Talk, judge: Callable[[], Any]) -> None:
    async def work() -> bool:
        task = asyncio.create_task(played(talk, Own(score=judge)))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(work())


def test_something_cancelled_that_an_environment_waits_for_is_its_fault(talk: Talk) -> None:
    async def judge() -> Any:
        waits = asyncio.create_task(asyncio.sleep(60))
        asyncio.get_running_loop().call_later(0.01, waits.cancel)
        await waits

    group = asyncio.run(played(talk, Own(), Own(score=judge)))
    assert (len(group.episodes), group.broken) == (1, ("task rows.jsonl:7: Own: CancelledError: ",))


@contextmanager
def on_signal(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
def test_a_signal_that_arrives_inside_an_environment_ends_the_run(talk: Talk, error: BaseException) -> None:
    def handler(number: int, frame: Any) -> None:
        raise error

    with on_signal(handler), pytest.raises(type(error)):
        asyncio.run(played(talk, Own(step=lambda: signal.raise_signal(signal.SIGUSR1))))
