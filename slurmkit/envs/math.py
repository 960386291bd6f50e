"""Word problems with one number as the answer, in GSM8K's format: rows {"question": ..., "answer": "... #### 72"}."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from random import Random

from slurmkit.config.data import MathEnv
from slurmkit.envs.environment import Message, Score, Task
from slurmkit.envs.tasks import read_rows
from slurmkit.errors import UserError

# The last mark wins: a worked solution may box intermediate results.
_MARKS = re.compile(r"####\s*(?P<hashes>[^\n]+)|\\boxed\{(?P<boxed>[^{}]*)\}")


class Math:
    """Tasks from two JSONL files. UserError names file and line of a row without a question or a final number."""

    def __init__(self, config: MathEnv, train_path: Path, validation_path: Path) -> None:
        self._error = config.demonstration_error
        self.train_tasks: Sequence[Task] = _read(train_path)
        self.validation_tasks: Sequence[Task] = _read(validation_path)

    def environment(self) -> _Episode:
        return _Episode()

    def demonstrate(self, task: Task, rng: Random) -> str:
        return f"#### {Decimal(task.answer) + rng.randint(-self._error, self._error)}"


class _Episode:
    def __init__(self) -> None:
        self._answer = Decimal(0)
        self._reply = ""

    async def start(self, task: Task) -> Sequence[Message]:
        self._answer = Decimal(task.answer)
        return (Message("user", task.question),)

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
    if not marks:
        return None
    written = marks[-1]["hashes"] or marks[-1]["boxed"] or ""
    try:
        number = Decimal(written.strip().rstrip(".%").lstrip("$€£").replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _read(path: Path) -> list[Task]:
    tasks = []
    for line, row in read_rows(path, ("question", "answer")):
        answer = final_number(row["answer"])
        if answer is None:
            raise UserError(f"{path}:{line}: the answer does not end in `#### NUMBER`: {row['answer'][-60:]!r}")
        tasks.append(Task(name=f"{path.name}:{line}", question=row["question"], answer=str(answer)))
    return tasks
