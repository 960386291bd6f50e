r"""Problems with one answer: a number, as GSM8K's `#### 72`, or any expression, as `\boxed{\frac12}` or DAPO's `34`."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from slurmkit.config.data import Data, MathEnv
from slurmkit.envs.answers import final_answer, is_prose, number
from slurmkit.envs.environment import Message, Opening, Score, Task, TaskSource
from slurmkit.envs.rows import Row, read_rows
from slurmkit.envs.tasks import read_sources
from slurmkit.envs.verifier import FAILED, Verifier
from slurmkit.errors import UserError


class Math:
    """Tasks from files or the hub. UserError names, for every source, the first row that is no such task."""

    def __init__(self, config: MathEnv, data: Data) -> None:
        self._error = config.demonstration_error
        self._verifier = Verifier(config.num_workers, config.verify_timeout_seconds)
        train, held_out = read_sources(data, lambda key, source: [_task(row) for row in read_rows(source, key)])
        self.train_sources: Sequence[TaskSource] = train
        self.train_tasks: Sequence[Task] = [task for source in train for task in source.tasks]
        self.validation_tasks: Sequence[Task] = held_out

    def environment(self) -> _Episode:
        return _Episode(self._verifier)

    def demonstrate(self, task: Task, rng: Random) -> str:
        off = rng.randint(-self._error, self._error)
        right = number(task.answer)
        if right is not None:
            return f"#### {right + off}"
        return rf"\boxed{{{off or task.answer}}}"


class _Episode:
    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._truth = ""
        self._reply = ""

    async def start(self, task: Task) -> Opening:
        self._truth = task.answer
        return Opening(task.messages)

    async def step(self, reply: Message) -> Sequence[Message]:
        self._reply = reply.content
        return ()

    async def score(self) -> Score:
        answer = final_answer(self._reply)
        found, right = number(answer), number(self._truth)
        has_failed = False
        if found is not None and right is not None:
            correct = found == right
        elif not answer or answer == self._truth:
            correct = bool(answer)
        elif right is not None and not any(char.isdigit() or char == "\\" for char in answer):
            correct = False  # words: models that are still to learn the form say many
        else:
            verdict = await self._verifier.compare(answer, self._truth)
            correct, has_failed = verdict == "right", verdict in FAILED
        return Score(reward=float(correct), correct=correct, counts={"verifier_failures": float(has_failed)})


def _task(row: Row) -> Task:
    answer = final_answer(row.output)
    if not answer and not is_prose(row.output):
        answer = final_answer(f"#### {row.output}")  # without what is mere layout
    if not answer:
        raise UserError(
            f"{row.place}: the answer does not end in `#### 72`, `\\boxed{{72}}` or `Answer: 72`, and is neither a "
            f"number nor an expression itself: {row.output[-60:]!r}"
        )
    found = number(answer)
    return Task(row.name, row.input, answer if found is None else str(found), row.context)
