"""Tasks, answers and the order of tasks."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path
from random import Random

import pytest

from slurmkit.config.data import ArithmeticEnv, Data, MathEnv
from slurmkit.envs.answers import final_number
from slurmkit.envs.arithmetic import Arithmetic
from slurmkit.envs.environment import Domain, Message, Score, Task, TaskSource
from slurmkit.envs.math import Math
from slurmkit.envs.tasks import TaskOrder
from slurmkit.errors import UserError
from tests.support.requirements import need_shared_data

TASKS = [Task(str(number), f"{number}=", str(number)) for number in range(10)]


def math(path: Path) -> Math:
    return Math(MathEnv(), Data.model_validate({name: {"data_path": str(path)} for name in ("train", "validation")}))


def order(tasks: list[Task], *, shuffle: bool = True, position: int = 0) -> TaskOrder:
    return TaskOrder([TaskSource(tasks, 1.0)], seed=3, shuffle=shuffle, position=position)


def judge(domain: Domain, task: Task, reply: str) -> Score:
    async def episode() -> Score:
        environment = domain.environment()
        assert (await environment.start(task)).messages == (Message("user", task.question),)
        assert not await environment.step(Message("assistant", reply))
        return await environment.score()

    return asyncio.run(episode())


def test_no_order_of_the_digits_of_a_held_out_sum_is_trained_on() -> None:
    domain = Arithmetic(ArithmeticEnv(), seed=1)
    kinds = [
        {tuple(sorted(task.name.split("+"))) for task in tasks}
        for tasks in (domain.train_tasks, domain.validation_tasks)
    ]
    assert not kinds[0] & kinds[1]
    assert len(domain.train_tasks) + len(domain.validation_tasks) == 1000
    assert 100 <= len(domain.validation_tasks) <= 300


def test_another_seed_holds_out_other_sums() -> None:
    first, second = (Arithmetic(ArithmeticEnv(), seed).validation_tasks for seed in (1, 2))
    assert first != second
    assert first == Arithmetic(ArithmeticEnv(), 1).validation_tasks


@pytest.mark.parametrize(("reply", "reward"), [("12", 1.0), ("13", 0.0), ("12 ", 0.0), ("", 0.0)])
def test_a_sum_is_right_or_wrong(reply: str, reward: float) -> None:
    domain = Arithmetic(ArithmeticEnv(), seed=1)
    assert judge(domain, Task("3+4+5", "3+4+5=", "12"), reply).reward == reward


def test_demonstrated_sums_are_right_about_one_time_in_seven() -> None:
    domain, rng = Arithmetic(ArithmeticEnv(demonstration_error=3), seed=1), Random(0)
    task = Task("3+4+5", "3+4+5=", "12")
    shown = [domain.demonstrate(task, rng) for _ in range(2000)]
    assert set(shown) == {str(number) for number in range(9, 16)}
    assert shown.count("12") / len(shown) == pytest.approx(1 / 7, abs=0.03)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 48/2=24 in May.\n#### 72", "72"),
        ("#### $1,200.", "1200"),
        ("####-3.50", "-3.5"),
        (r"the answer is \boxed{7}", "7"),
        (r"\boxed{1} no, \boxed{25\%} hm #### 25%", "25"),
        ("#### 1\n#### 2", "2"),
    ],
)
def test_the_last_marked_number_is_the_answer(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "72", "#### ", "#### many", r"\boxed{x}", "#### NaN", "#### Infinity"])
def test_text_without_a_marked_number_has_no_answer(text: str) -> None:
    assert final_number(text) is None


def test_real_rows_are_read_and_judged_by_their_number() -> None:
    path = need_shared_data("gsm8k/test.jsonl")
    domain = math(path)
    assert len(domain.train_tasks) == 1319
    task = domain.train_tasks[0]
    assert judge(domain, task, f"hm #### {task.answer}.00").correct
    assert not judge(domain, task, task.answer).correct


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{oops', "rows.jsonl:2: not JSON"),
        ('\n{"question": "a"}\n', "rows.jsonl:2: the key 'answer' must hold text"),
        ('{"question": "a", "answer": 3}', "rows.jsonl:1: the key 'answer' must hold text"),
        ("[1]", "rows.jsonl:1: must be a JSON object, found list"),
        ('{"question": "a", "answer": "three"}', "rows.jsonl:1: the answer does not end in"),
        ("\n \n", "rows.jsonl: holds no task"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        math(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        math(tmp_path / "none.jsonl")


def test_a_line_separator_inside_a_text_does_not_end_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b", "answer": "#### 1"}, ensure_ascii=False) + "\n")
    assert len(math(path).train_tasks) == 1


def test_each_epoch_draws_every_task_once_in_an_order_of_its_own() -> None:
    begun = order(TASKS)
    first, second = begun.draw(10), begun.draw(10)
    assert sorted(first, key=lambda task: int(task.name)) == TASKS
    assert sorted(second, key=lambda task: int(task.name)) == TASKS
    assert first != second


def test_an_order_taken_up_again_goes_on_as_if_it_had_not_stopped() -> None:
    whole = order(TASKS).draw(27)
    begun = order(TASKS)
    drawn = begun.draw(13)
    assert drawn + order(TASKS, position=begun.position).draw(14) == whole


def test_without_shuffling_tasks_come_as_they_are() -> None:
    assert order(TASKS, shuffle=False).draw(12) == TASKS + TASKS[:2]


def test_the_digest_tells_data_sets_apart() -> None:
    digests = [order(tasks).digest for tasks in (TASKS, TASKS[:-1], TASKS[::-1])]
    assert len(set(digests)) == 3
