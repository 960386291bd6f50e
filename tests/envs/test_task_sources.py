"""Where tasks come from: real files and folders of every kind, alone and mixed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from slurmkit.config.data import Data, MathEnv
from slurmkit.envs.environment import Task, TaskSource
from slurmkit.envs.math import Math
from slurmkit.envs.tasks import TaskOrder
from slurmkit.errors import UserError

ROWS = [{"question": f"{number}+1", "answer": f"#### {number + 1}", "level": number} for number in range(6)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, **options)
    return str(path)


def saved(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> str:
    datasets.Dataset.from_list(list(rows)).save_to_disk(path)
    return str(path)


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(train: Any, validation: Any = None) -> Math:
    return Math(MathEnv(), Data.model_validate({"train": train} | ({"validation": validation} if validation else {})))


def questions(tasks: Sequence[Task]) -> list[str]:
    return [task.question for task in tasks]


def test_rows_are_the_same_wherever_they_come_from(tmp_path: Path) -> None:
    with_splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:1])})
    with_splits["test"] = datasets.Dataset.from_list(ROWS)
    with_splits.save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files" / "train.jsonl")
    sources = [
        {"data_path": jsonl(tmp_path / "rows.jsonl")},
        {"data_path": parquet(tmp_path / "rows.parquet", row_group_size=4)},
        {"data_path": saved(tmp_path / "folder")},
        {"data_path": str(tmp_path / "splits"), "split": "test"},
        {"data_path": str(tmp_path / "files"), "split": "train[:6]"},
    ]
    found = [read(source).train_tasks for source in sources]
    assert [[(task.question, task.answer) for task in tasks] for tasks in found] == [
        [(row["question"], row["answer"][5:]) for row in ROWS]
    ] * len(sources)
    assert [tasks[1].name for tasks in found] == ["rows.jsonl:2", "rows.parquet:2", "folder:2", "splits:2", "files:2"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path / "rows.jsonl"))
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert questions(read({"data_path": str(path)}).train_tasks) == [row["question"] for row in ROWS]


def test_keys_have_the_names_that_the_configuration_gives_them(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1", "expected": "2"}, {"prompt": "2+2", "expected": "$4.00"}]
    for path in (jsonl(tmp_path / "rows.jsonl", rows), parquet(tmp_path / "rows.parquet", rows)):
        tasks = read({"data_path": path, "input_key": "prompt", "output_key": "expected"}).train_tasks
        assert [(task.question, task.answer) for task in tasks] == [("1+1", "2"), ("2+2", "4.00")]


def test_what_cannot_be_read_is_named_for_all_sources_at_once(tmp_path: Path) -> None:
    bad_row = [*ROWS[:2], {"question": "3+3", "answer": None}]
    cut = Path(parquet(tmp_path / "cut.parquet", row_group_size=2))
    cut.write_bytes(cut.read_bytes()[:200])
    scrambled = Path(parquet(tmp_path / "scrambled.parquet", row_group_size=2, compression="gzip"))
    with pyarrow.parquet.ParquetFile(scrambled) as file:
        second = file.metadata.row_group(1).column(0).data_page_offset
    scrambled.write_bytes(scrambled.read_bytes()[:second] + b"\0" * 20 + scrambled.read_bytes()[second + 20 :])
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": pyarrow.array([], "string"), "answer": []}), empty)
    no_text, no_table = "the key 'answer' must hold text", "cannot be read as Parquet, after row"
    lines = {
        jsonl(tmp_path / "a.jsonl", bad_row): rf"/a\.jsonl:3: {no_text} \(keys: question, answer\)",
        parquet(tmp_path / "b.parquet", bad_row): rf"/b\.parquet: row 3: {no_text}",
        saved(tmp_path / "c", bad_row): rf"/c: row 3: {no_text}",
        parquet(tmp_path / "d.parquet", [{"q": "1"}]): r"/d\.parquet: there is no column 'question' \(columns: q\)",
        parquet(tmp_path / "e.parquet", [{"question": 1, "answer": "1"}]): r"/e\.parquet: row 1: the key 'question'",
        parquet(tmp_path / "f.parquet", [{"question": "1", "answer": "one"}]): r"/f\.parquet: row 1: the answer does",
        str(cut): rf"/cut\.parquet: {no_table} 0: ",
        str(scrambled): rf"/scrambled\.parquet: {no_table} 2: ",
        str(empty): r"/empty\.parquet: holds no task",
        str(tmp_path / "gone.parquet"): rf"/gone\.parquet: {no_table} 0: .*No such file",
        str(tmp_path): r"data\.train\.10\.data_path: .* cannot be read: ",
    }
    with pytest.raises(UserError) as refused:
        read([{"data_path": path} for path in lines], {"data_path": jsonl(tmp_path / "none.jsonl", [])})
    found = str(refused.value).splitlines()
    for line, pattern in zip(found, [*lines.values(), r"/none\.jsonl: holds no task"], strict=True):
        assert re.search(pattern, line), line


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"question": "1 \ud83d", "answer": "1"}, r"the key 'question' .*: '\\ud83d' at position 2"),
        ({"question": "1", "answer": "1 \ude00"}, r"the key 'answer' .*: '\\ude00' at position 2"),
        ({"question": [{"role": "user", "content": "\ud83d"}], "answer": "1"}, r"the key 'question\.0\.content' "),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_line_and_key(tmp_path: Path, row: dict[str, Any], place: str) -> None:
    whole = {"question": "\ud83d\ude00", "answer": "1", "unused": "\ud83d"}
    with pytest.raises(UserError, match=rf"/rows\.jsonl:2: {place}"):
        read({"data_path": jsonl(tmp_path / "rows.jsonl", [whole, row])})


def test_tables_of_the_library_with_text_that_is_not_utf8_are_named(tmp_path: Path) -> None:
    lines, tables = tmp_path / "lines", tmp_path / "tables"
    for folder in (lines, tables):
        folder.mkdir()
    jsonl(lines / "train.jsonl", [*ROWS, {"question": "\ud83d", "answer": "1"}])
    bad = pyarrow.array([b"1", b"\xed\xa0\xbd"]).view(pyarrow.string())
    table = pyarrow.table({"question": bad, "answer": pyarrow.array(["1", "2"])})
    pyarrow.parquet.write_table(table, tables / "train.parquet")
    with pytest.raises(UserError) as refused:
        read([{"data_path": str(folder), "split": "train"} for folder in (lines, tables)])
    first, second = str(refused.value).splitlines()
    assert re.search(r"/lines cannot be read: .*surrogate pair in string is invalid. in row 6", first), first
    assert re.search(r"/tables: rows 1 to 1000: text that is not UTF-8: 'utf-8' codec can't decode", second), second


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "1" * 5000])
def test_json_that_python_does_not_read_is_named_by_its_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{json.dumps(ROWS[0])}\n{{"question": {value}, "answer": "1"}}\n')
    with pytest.raises(UserError, match=r"/rows\.jsonl:2: cannot be read as JSON: "):
        read({"data_path": str(path)})


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    for split, shown in ((None, "null"), ("test", "test")):
        with pytest.raises(UserError, match=rf"^data\.train\.split: .*/splits has train, not {shown}$"):
            read({"data_path": str(tmp_path / "splits"), "split": split})
    with pytest.raises(UserError, match=r"data\.train\.split: .*/one is a data set without splits: leave test out"):
        read({"data_path": saved(tmp_path / "one"), "split": "test"})


def test_a_data_set_that_the_hub_does_not_give_is_one_clear_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as refused:
        read({"data_path": "somebody/sums", "split": "train"})
    assert str(refused.value).startswith(
        "data.train.data_path: somebody/sums is no file or folder here, and cannot be had from the hub: "
    )
    assert "\n" not in str(refused.value)


def mixture(sizes: Sequence[int], weights: Sequence[float], position: int = 0) -> TaskOrder:
    sources = [
        TaskSource([Task(f"{source}:{number}", "?", "1") for number in range(size)], weight)
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return TaskOrder(sources, seed=3, shuffle=True, position=position)


def test_sources_follow_their_weights_in_every_window_with_separate_epochs() -> None:
    names = [task.name for task in mixture([7, 100, 3], [0.2, 0.5, 0.3]).draw(1000)]
    for first in range(0, 1000, 50):
        counts = Counter(name[0] for name in names[first : first + 50])
        assert [counts[source] for source in "012"] == pytest.approx([10, 25, 15], abs=2)
    for source, size in zip("012", (7, 100, 3), strict=True):
        own = [name for name in names if name[0] == source]
        epochs = [own[first : first + size] for first in range(0, len(own) - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_sources_without_weights_are_all_used_up_in_one_epoch(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / f"{size}.jsonl", ROWS[:size]) for size in (1, 2, 6)]
    domain = read([{"data_path": path} for path in paths])
    names = [task.name for task in TaskOrder(domain.train_sources, seed=1, shuffle=True).draw(18)]
    assert sorted(names[:9]) == sorted(names[9:]) == sorted(task.name for task in domain.train_tasks)
    assert names[:9] != names[9:]


@pytest.mark.parametrize("weights", [(1.0, 2.0, 3.0), (0.1, 0.7, 0.2), (5.0, 4.0, 3.0)])
def test_a_mixture_taken_up_anywhere_goes_on_as_if_it_had_not_stopped(weights: tuple[float, ...]) -> None:
    whole = mixture([5, 4, 3], weights).draw(60)
    for position in range(60):
        assert mixture([5, 4, 3], weights, position).draw(5) == mixture([5, 4, 3], weights).draw(position + 5)[-5:]
        assert mixture([5, 4, 3], weights, position).draw(60 - position) == whole[position:]


def test_the_digest_is_of_all_sources_and_of_where_each_ends() -> None:
    tasks = [Task(str(number), "?", "1") for number in range(4)]
    cuts = [(tasks,), (tasks[:1], tasks[1:]), (tasks[:2], tasks[2:]), (tasks[2:], tasks[:2]), (tasks[:2], tasks[3:])]
    digests = {TaskOrder([TaskSource(part, 1) for part in cut], seed=1, shuffle=True).digest for cut in cuts}
    assert len(digests) == len(cuts)


def test_split_validation_depends_on_its_own_seed_and_shares_no_question(tmp_path: Path) -> None:
    rows = [{"question": f"{number % 50}+1", "answer": f"#### {number % 50 + 1}"} for number in range(100)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    split = {"data_path": path, "split_validation_size": 0.2}
    domain = read(split)
    train, validation = questions(domain.train_tasks), questions(domain.validation_tasks)
    assert (len(train), len(validation)) == (80, 20)
    assert not set(train) & set(validation)
    assert questions(read(split).validation_tasks) == validation
    assert set(questions(read(split | {"seed": 7}).validation_tasks)) != set(validation)
    with pytest.raises(UserError, match=r"data\.train\.split_validation_size 0\.001 of the 100 tasks in .* leaves 100"):
        read(split | {"split_validation_size": 0.001})


def test_the_first_validation_tasks_are_of_all_sources(tmp_path: Path) -> None:
    few, many = jsonl(tmp_path / "few.jsonl", ROWS[:2]), jsonl(tmp_path / "many.jsonl", ROWS)
    domain = read({"data_path": few}, [{"data_path": many}, {"data_path": few}])
    names = [task.name for task in domain.validation_tasks]
    assert len(names) == 8
    assert Counter(name.partition(".")[0] for name in names[:4]) == {"many": 3, "few": 1}
