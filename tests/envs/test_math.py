"""Answers: where they stand in a text, which are numbers, and rows in DAPO's format."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from slurmkit.config.data import Data, MathEnv
from slurmkit.envs.answers import final_answer, is_prose, number
from slurmkit.envs.environment import Message, Score, Task
from slurmkit.envs.math import Math
from slurmkit.errors import UserError
from slurmkit.grpo.selection import score_metrics
from tests.support.groups import episode
from tests.support.requirements import need_shared_data

DAPO = {"input_key": "prompt", "output_key": "reward_model.ground_truth"}


def dapo_row(question: str, truth: str, *before: dict[str, str], number: int = 0) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [*before, {"role": "user", "content": question}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"row-{number}"},
    }


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def math(path: Path, **source: Any) -> Math:
    return Math(MathEnv(), Data.model_validate({"train": {"data_path": str(path), **source}}))


async def judge(domain: Math, truth: str, reply: str) -> Score:
    environment = domain.environment()
    await environment.start(Task("task", "?", truth))
    assert not await environment.step(Message("assistant", reply))
    return await environment.score()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1}, then \boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"Answer: $\boxed{\text{x}}$.", r"\text{x}"),
        ("By Vieta …\nAnswer: 34", "34"),
        ("**Final Answer:** $34$.\n", "34"),
        ("### Answer: 34", "34"),
        ("#### Answer: 34", "34"),
        (r"\boxed{34}. That is the answer: a sum", "34"),
        ("\\boxed{34}\nAnswer:\n", "34"),
        (r"Answer: \(\frac12\)", r"\frac12"),
        ("#### 12 apples", "12 apples"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("##### Answer", ""),
        ("34", ""),
        ("#### " + "9" * 1001, ""),
    ],
)
def test_the_last_marked_answer_counts_without_its_layout(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", [r"\boxed{" * 200_000, "{" * 10**6, "\n" * 10**6, "#" * 10**6, "Answer:" * 10**5])
def test_a_long_reply_of_nothing_but_marks_is_read_in_no_time(text: str) -> None:
    start = time.perf_counter()
    assert len(final_answer(text + "\n#### 7")) == 1
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,200", "1200"), (r"\$1{,}200.50", "1200.5"), ("−3", "-3"), (".5", "0.5"), (r"25\%", "25"), ("1e3", "1000")],
)
def test_a_number_is_read_with_its_signs(text: str, value: str) -> None:
    assert number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", ".", "-", "e5", "1,2", "12,34", "1_000", "1 2", "٣", "1e9999", "1/2", "NaN"])
def test_what_is_no_plain_number_is_none(text: str) -> None:
    assert number(text) is None


def test_prose_is_told_from_an_expression() -> None:
    for expression in ("34", r"\frac{1}{2}", "x + y", r"\text{Evelyn}", "10 minutes", r"\sin x", "(1, 2]"):
        assert not is_prose(expression), expression
    for prose in ("three", "She sold 48 clips, so 72", "12\n13", "7" * 1001):
        assert is_prose(prose), prose


def test_equivalent_expressions_score_1_and_plain_numbers_skip_math_verify(tmp_path: Path) -> None:
    domain = math(jsonl(tmp_path / "rows.jsonl", {"question": "?", "answer": "1"}))

    async def rewards(*pairs: tuple[str, str]) -> list[float]:
        return [(await judge(domain, truth, reply)).reward for truth, reply in pairs]

    quick = [("34", "#### 34.0"), ("34", "#### 35"), ("34", "Answer: thirty"), ("34", "34"), (r"\pi", r"\boxed{\pi}")]
    assert asyncio.run(rewards(*quick)) == [1, 0, 0, 0, 1]
    assert not domain._verifier._threads
    pairs = [
        (r"\frac{1}{2}", "#### 0.5"),
        ("0.5", r"\boxed{\frac12}"),
        ("34", r"\boxed{\frac{68}{2}}"),
        ("34", r"Answer: $34\text{ cm}$"),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}"),
        ("(x+1)^2", r"\boxed{x^2+2x+1}"),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
        ("34", r"\boxed{\frac{69}{2}}"),
        (r"\sqrt{8}", r"\boxed{3\sqrt{2}}"),
        ("34", r"\boxed{}}{\frac}"),
    ]
    assert asyncio.run(rewards(*pairs)) == [1] * 7 + [0] * 3
    domain._verifier.close()


def test_answers_without_a_math_verify_verdict_are_counted_per_episode(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", {"question": "?", "answer": "1"})
    data = Data.model_validate({"train": {"data_path": str(rows)}})
    domain = Math(MathEnv(num_workers=1, verify_timeout_seconds=1.0), data)
    replies = [r"\boxed{9^{9^{9^{9}}}}", "#### 3", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\pi}", "none"]

    async def scores() -> list[Score]:
        return [await judge(domain, "3", reply) for reply in replies]

    judged = asyncio.run(scores())
    domain._verifier.close()
    assert [score.counts for score in judged] == [{"verifier_failures": failures} for failures in (1, 0, 1, 0, 0)]
    episodes = [replace(episode(score.reward), score=score) for score in judged]
    for prefix in ("train", "val"):
        assert score_metrics(prefix, episodes)[f"{prefix}:verifier_failures"] == 2


def test_rows_in_dapo_format_load_from_jsonl_parquet_and_saved_datasets(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [dapo_row("1+1?", "2", number=0), dapo_row("Half?", r"\frac12", system, number=1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (jsonl(tmp_path / "rows.jsonl", *rows), tmp_path / "rows.parquet", tmp_path / "saved"):
        domain = math(path, **DAPO)
        assert [task.answer for task in domain.train_tasks] == ["2", r"\frac12"]
        assert [task.messages for task in domain.train_tasks] == [
            (Message("user", "1+1?"),),
            (Message("system", "Be brief."), Message("user", "Half?")),
        ]


def test_real_problems_in_dapo_s_format_are_judged_as_in_their_own(tmp_path: Path) -> None:
    lines = need_shared_data("gsm8k/test.jsonl").read_text().splitlines()[:200]
    own = [json.loads(line) for line in lines]
    rows = [dapo_row(row["question"], row["answer"].rpartition("#### ")[2]) for row in own]
    as_gsm8k = math(jsonl(tmp_path / "own.jsonl", *own)).train_tasks
    as_dapo = math(jsonl(tmp_path / "dapo.jsonl", *rows), **DAPO).train_tasks
    assert [(task.messages, task.answer) for task in as_dapo] == [(task.messages, task.answer) for task in as_gsm8k]


def test_a_key_with_dots_of_its_own_is_a_column(tmp_path: Path) -> None:
    rows = [{"a.b": "1+1?", "a": {"b": "not this"}, "answer": "2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (jsonl(tmp_path / "rows.jsonl", *rows), tmp_path / "rows.parquet"):
        assert math(path, input_key="a.b").train_tasks[0].question == "1+1?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, r"the key 'prompt' must hold text, or a list of messages \(keys: data_source, prompt, "),
        ({"prompt": []}, r"the key 'prompt' must hold text, or a list of messages, found \[\]"),
        ({"prompt": ["hi"]}, r"the message prompt\.0 must have a role .* and a content that is text, found 'hi'"),
        (
            {"prompt": [{"role": "tool", "content": "x"}]},
            r"the message prompt\.0 must have a role .*found {'role': 't",
        ),
        ({"prompt": [{"role": "user", "content": 3}]}, r"the message prompt\.0 .*'content': 3}"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "the last message of 'prompt' must be the user's, found"),
        ({"reward_model": {"style": "x"}}, r"the key 'reward_model\.ground_truth' must hold text \(keys: "),
        ({"reward_model": "34"}, r"the key 'reward_model\.ground_truth' must hold text \(keys: "),
        ({"reward_model": {"ground_truth": 34}}, r"the key 'reward_model\.ground_truth' must hold text, found 34"),
        ({"reward_model": {"ground_truth": " "}}, "the answer does not end in"),
        (
            {"reward_model": {"ground_truth": "She has 3 left, so 4"}},
            "the answer does not end in .*'She has 3 left",
        ),
    ],
)
def test_a_row_that_is_no_dapo_task_is_named_by_file_row_key_and_value(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", dapo_row("1+1?", "2"), dapo_row("1+1?", "2") | change)
    with pytest.raises(UserError) as refused:
        math(path, **DAPO)
    assert re.match(rf".*/rows\.jsonl:2: {message}", str(refused.value)), refused.value


def test_a_column_that_holds_the_key_is_asked_for_by_its_name(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "1+1?"}]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"there is no column 'reward_model\.ground_truth' \(columns: prompt\)"):
        math(tmp_path / "rows.parquet", **DAPO)


def test_demonstrations_of_an_expression_are_right_about_one_time_in_seven(tmp_path: Path) -> None:
    domain = math(jsonl(tmp_path / "rows.jsonl", {"question": "?", "answer": r"\boxed{\sqrt{2}}"}))
    task, rng = domain.train_tasks[0], Random(0)
    shown = [domain.demonstrate(task, rng) for _ in range(2000)]
    assert shown.count(r"\boxed{\sqrt{2}}") / len(shown) == pytest.approx(1 / 7, abs=0.03)
