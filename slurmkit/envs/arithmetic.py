"""Sums of single digits: small enough that a model of 0.4 million parameters learns them on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

from slurmkit.config.data import ArithmeticEnv
from slurmkit.envs.environment import Message, Opening, Score, Task, TaskSource


class Arithmetic:
    """All sums of `num_terms` digits. Held-out problems follow from the seed and are never trained on.

    Orders of the same digits stay on one side: 1+2+3 in training and 3+2+1 in validation would make the accuracy
    say less than it seems to.
    """

    def __init__(self, config: ArithmeticEnv, seed: int) -> None:
        self._error = config.demonstration_error
        rng = Random(f"arithmetic {seed}")
        train: list[Task] = []
        validation: list[Task] = []
        sides: dict[tuple[int, ...], list[Task]] = {}
        for digits in product(range(10), repeat=config.num_terms):
            kind = tuple(sorted(digits))
            if kind not in sides:
                held_out = rng.random() < config.validation_fraction
                sides[kind] = validation if held_out else train
            text = "+".join(map(str, digits))
            sides[kind].append(Task(name=text, question=f"{text}=", answer=str(sum(digits))))
        # In order of counting, a limit on validation samples would keep the sums that start with 0.
        rng.shuffle(validation)
        self.train_sources: Sequence[TaskSource] = (TaskSource(train, 1.0),)
        self.train_tasks: Sequence[Task] = train
        self.validation_tasks: Sequence[Task] = validation

    def environment(self) -> _Episode:
        return _Episode()

    def demonstrate(self, task: Task, rng: Random) -> str:
        return str(max(0, int(task.answer) + rng.randint(-self._error, self._error)))


class _Episode:
    def __init__(self) -> None:
        self._answer = ""
        self._reply = ""

    async def start(self, task: Task) -> Opening:
        self._answer = task.answer
        return Opening(task.messages)

    async def step(self, reply: Message) -> Sequence[Message]:
        self._reply = reply.content
        return ()

    async def score(self) -> Score:
        correct = self._reply == self._answer
        return Score(reward=float(correct), correct=correct)
