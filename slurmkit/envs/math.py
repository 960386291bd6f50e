"""Word problems with one number as the answer, as in GSM8K: {"question": ..., "answer": "... #### 72"}, or "72"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from random import Random

from slurmkit.config.data import Data, MathEnv
from slurmkit.envs.environment import Message, Opening, Score, Task, TaskSource
from slurmkit.envs.rows import Row, read_rows
from slurmkit.envs.tasks import read_sources
from slurmkit.errors import UserError

# The last mark wins: a worked solution may box intermediate results.
_MARKS = re.compile(r"####\s*(?P<hashes>[^\n]+)|\\boxed\{(?P<boxed>[^{}]*)\}")


class Math:
    """Tasks from files or the hub. UserError names, for every source, the first row that is no such task."""

    def __init__(self, config: MathEnv, data: Data) -> None:
        self._error = config.demonstration_error
        train, held_out = read_sources(data, lambda key, source: [_task(row) for row in read_rows(source, key)])
        self.train_sources: Sequence[TaskSource] = train
        self.train_tasks: Sequence[Task] = [task for source in train for task in source.tasks]
        self.validation_tasks: Sequence[Task] = held_out

    def environment(self) -> _Episode:
        return _Episode()

    def demonstrate(self, task: Task, rng: Random) -> str:
        return f"#### {Decimal(task.answer) + rng.randint(-self._error, self._error)}"


class _Episode:
    def __init__(self) -> None:
        self._answer = Decimal(0)
        self._reply = ""

    async def start(self, task: Task) -> Opening:
        self._answer = Decimal(task.answer)
        return Opening(task.messages)

    async def step(self, reply: Message) -> Sequence[Message]:
        self._reply = reply.content
        return ()

    async def score(self) -> Score:
        correct = final_number(self._reply) == self._answer
        return Score(reward=float(correct), correct=correct)


def final_number(text: str) -> Decimal | None:
    r"""The number after the last `#### ` or in the last `\boxed{}`; None where there is none.

    Thousands separators, currency signs, a percent sign and a final full stop do not count: `$1,200.` is 1200.
    """
    marks = list(_MARKS.finditer(text))
    return _number(marks[-1]["hashes"] or marks[-1]["boxed"] or "") if marks else None


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().rstrip(".%").lstrip("$€£").replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _task(row: Row) -> Task:
    answer = _number(row.output)
    if answer is None:
        answer = final_number(row.output)
    if answer is None:
        raise UserError(
            f"{row.place}: the answer does not end in `#### NUMBER`, and is no number itself: {row.output[-60:]!r}"
        )
    return Task(name=row.name, question=row.input, answer=str(answer))
