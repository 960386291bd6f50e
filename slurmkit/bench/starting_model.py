"""`python -m slurmkit.bench.starting_model`: what both sides of `slurmkit bench train` start from, tasks and a model.

A question is a row of digits and the answer its last one. The model has seen demonstrations that say any number of
dots, then a digit that is sometimes right: so its completions differ in length like a geometric distribution, up to the
limit, and there is something to strengthen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from slurmkit.bench.child import answer
from slurmkit.config.model import FromScratch
from slurmkit.envs.environment import Environment, Task, TaskSource
from slurmkit.grpo.from_scratch import make_model

# Of ten digits, what is demonstrated is right this often, and else any of them.
_RIGHT = 0.25


class LastDigit:
    """A domain for demonstrations alone: both sides judge by env.name math."""

    def __init__(self, mean_dots: float) -> None:
        self._mean_dots = mean_dots
        rows = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
        Random("last digit").shuffle(rows)
        self.train_tasks: Sequence[Task] = [Task(f"{a}{b}{c}", f"{a} {b} {c}", str(c)) for a, b, c in rows]
        self.train_sources = [TaskSource(self.train_tasks, 1.0)]
        self.validation_tasks: Sequence[Task] = self.train_tasks[:1]

    def environment(self) -> Environment:
        raise NotImplementedError("nothing is played here")

    def demonstrate(self, task: Task, rng: Random) -> str:
        said = task.answer if rng.random() < _RIGHT else str(rng.randrange(10))
        return "." * int(rng.expovariate(1 / self._mean_dots)) + f"#### {said}"


def make(folder: Path, sizes: FromScratch, mean_dots: float, max_length: int, seed: int) -> None:
    """Write `model/` and `tasks.jsonl` (env.name math's rows) to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    domain = LastDigit(mean_dots)
    rows = [json.dumps({"question": task.question, "answer": f"#### {task.answer}"}) for task in domain.train_tasks]
    (folder / "tasks.jsonl").write_text("\n".join(rows) + "\n")
    make_model(folder / "model", sizes, domain, max_length=max_length, seed=seed)


def _work(settings: dict[str, object]) -> dict[str, object]:
    folder, sizes = Path(str(settings["folder"])), FromScratch.model_validate(settings["sizes"])
    make(folder, sizes, float(str(settings["mean_dots"])), int(str(settings["max_length"])), int(str(settings["seed"])))
    return {}


if __name__ == "__main__":
    answer(_work)
