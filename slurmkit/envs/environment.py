"""What a task, a domain and an environment are: the only things that rollouts know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. Example: Task(name="sum-3+4+5", question="3+4+5=", answer="12")."""

    name: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Tasks that are drawn in proportion to `weight`, relative to the other sources' weights."""

    tasks: Sequence[Task]
    weight: float


@dataclass(frozen=True, slots=True)
class Score:
    """What an episode was worth: the reward that is trained on, and whether the answer counts as right."""

    reward: float
    correct: bool


class Environment(Protocol):
    """One episode. Anything that it raises masks the episode: it is counted, and never trained on as a zero.

    Coroutines, as a real environment waits for tools and servers while others go on.
    """

    async def start(self, task: Task) -> Sequence[Message]:
        """Open the episode: the messages that the model answers."""

    async def step(self, reply: Message) -> Sequence[Message]:
        """Take the model's reply; the messages that follow it, none where the episode is over."""

    async def score(self) -> Score:
        """Judge the episode. Called once, at its end."""


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

    def environment(self) -> Environment:
        """A fresh environment for one episode."""

    def demonstrate(self, task: Task, rng: Random) -> str:
        """A reply in the right form and sometimes right: what a model made from scratch starts from."""
