"""What a task, a domain and an environment are: the only things that rollouts know of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that a reply asks for. Example: ToolCall("call_0", "email_delete_email", '{"email_id": "00000057"}')."""

    id: str
    """Unique in its conversation."""
    name: str
    arguments: str
    """A JSON object, as text: nothing but its being one has been looked at."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant's message: the calls that were read from it; `content` is then the text beside them."""
    tool_call_id: str = ""
    """Of a tool's message: the call that it answers."""
    name: str = ""
    """Of a tool's message: the tool."""


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A tool that a model may call. Equal to itself alone, so that environments share one for all episodes."""

    definition: Mapping[str, Any]
    """As OpenAI's chat completions have it: {"type": "function", "function": {"name", "description", "parameters"}}."""

    @property
    def name(self) -> str:
        """What calls name it by."""
        return str(self.definition["function"]["name"])


@dataclass(frozen=True, slots=True)
class Opening:
    """What an episode starts with: the messages that the model answers, and the tools that it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. Example: Task(name="sum-3+4+5", question="3+4+5=", answer="12")."""

    name: str
    question: str
    """What the user says."""
    answer: str
    """What the environment judges by, in whatever form it reads."""
    context: tuple[Message, ...] = ()
    """Messages before the question, such as a system prompt of the task's own."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that is said before the model is."""
        return (*self.context, Message("user", self.question))


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Tasks that are drawn in proportion to `weight`, relative to the other sources' weights."""

    tasks: Sequence[Task]
    weight: float


@dataclass(frozen=True, slots=True)
class Score:
    """What an episode was worth: the reward that is trained on, and whether the answer counts as right."""

    reward: float
    """From -1e9 to 1e9 (`MAX_REWARD`)."""
    correct: bool
    counts: Mapping[str, float] = field(default_factory=dict)
    """What else the environment counted. metrics.jsonl has the sum over a step's episodes as train: and val: NAME."""


class Environment(Protocol):
    """One episode. Anything that it raises masks the episode: it is counted, and never trained on as a zero. A value
    that a method below does not allow masks it as well (slurmkit/rollout/contract.py).

    Coroutines, as a real environment waits for tools and servers while others go on.
    """

    async def start(self, task: Task) -> Opening:
        """Open the episode."""

    async def step(self, reply: Message) -> Sequence[Message]:
        """Take the model's reply; the messages that follow it, none where the episode is over.

        A reply with `tool_calls` is answered by one tool message for each, in order. What a model may get wrong (an
        unknown tool, arguments of the wrong type, a call that fails) is an answer that says so, so that the model can
        act on it; nothing is raised.
        """

    async def score(self) -> Score:
        """Judge the episode. Called once, at its end, whatever ended it."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyCall:
    """One reply that an agent had from the policy: the tokens of its prompt, its own, and their logprobs."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """An episode that an agent has played, with its calls of the policy in order. `is_cut`: the last had to stop."""

    calls: tuple[PolicyCall, ...]
    messages: tuple[Message, ...]
    num_tool_calls: int
    score: Score
    is_cut: bool


class Agent(ABC):
    """One episode in other hands, which ask the policy over HTTP. What it raises is meant as an Environment's is.

    A class to inherit from, as each episode is asked whether it is one: of a Protocol, that takes as long as the rest.
    """

    @abstractmethod
    async def ready(self) -> None:
        """Wait until it can be asked. UserError where it cannot, which ends the run."""

    @abstractmethod
    async def run(self, task: Task) -> Played:
        """Play the whole episode."""


class Domain(Protocol):
    """A kind of environment with its tasks."""

    @property
    def train_sources(self) -> Sequence[TaskSource]:
        """What is trained on, with the sources' weights."""

    @property
    def train_tasks(self) -> Sequence[Task]:
        """The tasks of all of them."""

    @property
    def validation_tasks(self) -> Sequence[Task]:
        """What is held out."""

    def environment(self) -> Environment | Agent:
        """A fresh environment for one episode, or the agent that plays it."""

    def demonstrate(self, task: Task, rng: Random) -> str:
        """A reply in the right form and sometimes right: what a model made from scratch starts from."""
