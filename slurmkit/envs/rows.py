"""Rows of text from wherever a source of tasks is: JSON lines, Parquet, a folder of the `datasets` library, the hub.

The libraries are imported where something of theirs is read, as each takes a second.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slurmkit.config.data import DataSource
from slurmkit.envs.environment import Message
from slurmkit.envs.text import refuse_half_pairs
from slurmkit.errors import UserError

_BATCH = 1000


class Row(NamedTuple):
    """One row's two texts. `name` is short, as rows.jsonl:7; `place` is what a message needs to find the row. `context`
    is what was said before the input."""

    name: str
    place: str
    input: str
    output: str
    context: tuple[Message, ...] = ()


class Record(NamedTuple):
    """One row with all its values; `name` and `place` as of a Row."""

    name: str
    place: str
    values: Mapping[str, Any]


def read_rows(source: DataSource, key: str) -> Iterator[Row]:
    """All rows of the source at the dotted key `key`; lines, and rows of a table, are counted from 1.

    Raises UserError with file and row where a row is not what it must be, and with the file, or the name on the hub,
    where it cannot be read or holds no row.
    """
    for name, place, row in read_records(source, key, (source.input_key, source.output_key)):
        try:
            for used in (source.input_key, source.output_key):
                refuse_half_pairs(_value(row, used), used)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        *context, question = _messages(row, source.input_key, place)
        answer = _value(row, source.output_key)
        if not isinstance(answer, str):
            raise UserError(f"{place}: the key {source.output_key!r} must hold text{_but(row, answer)}")
        yield Row(name, place, question.content, answer, tuple(context))


def read_records(source: DataSource, key: str, columns: Sequence[str]) -> Iterator[Record]:
    """As `read_rows`, with values of any kind: of tables the `columns`, of JSON lines whatever there is."""
    assert source.data_path is not None  # the schema has seen to it
    path, found = Path(source.data_path), 0
    if path.is_dir() or (source.may_be_on_hub and not path.exists()):
        name, rows = path.name if path.is_dir() else source.data_path, _dataset(source, key, columns)
    elif path.suffix == ".parquet":
        name, rows = path.name, _parquet(path, columns)
    else:
        name, rows = path.name, json_lines(path)
    for place, number, row in rows:
        yield Record(f"{name}:{number}", place, row)
        found += 1
    if not found:
        raise UserError(f"{source.data_path}: holds no task")


_Rows = Iterator[tuple[str, int, Mapping[str, Any]]]


def _value(row: Mapping[str, Any], key: str) -> Any:
    """What is at a key, or, along its dots, inside others; None where there is nothing."""
    if key in row or "." not in key:
        return row.get(key)
    first, rest = key.split(".", 1)
    inner = row.get(first)
    return _value(inner, rest) if isinstance(inner, Mapping) else None


def _but(row: Mapping[str, Any], value: Any) -> str:
    """What a row has in place of what it must have."""
    if value is None:
        return f" (keys: {', '.join(map(str, row)) or 'none'})"
    shown = repr(value)
    return f", found {shown if len(shown) <= 100 else shown[:99] + '…'}"


def _messages(row: Mapping[str, Any], key: str, place: str) -> list[Message]:
    """A prompt: one user's message, or several of which the last is."""
    value = _value(row, key)
    if isinstance(value, str):
        return [Message("user", value)]
    if not isinstance(value, list) or not value:
        what = "must hold text, or a list of messages"
        raise UserError(f"{place}: the key {key!r} {what}{_but(row, value)}")
    found = []
    for index, each in enumerate(value):
        role, content = (each.get("role"), each.get("content")) if isinstance(each, Mapping) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(
                f"{place}: the message {key}.{index} must have a role (system, user or assistant) and a content that "
                f"is text{_but(row, each)}"
            )
        found.append(Message(role, content))
    if found[-1].role != "user":
        raise UserError(f"{place}: the last message of {key!r} must be the user's, found one of role {found[-1].role}")
    return found


def json_lines(path: Path) -> _Rows:
    """Place, number and object of every line that is not empty. UserError names file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
            raise UserError(f"{place}: cannot be read as JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: must be a JSON object, found {type(row).__name__}")
        yield place, number, row


def _parquet(path: Path, columns: Sequence[str]) -> _Rows:
    parquet = _library("pyarrow.parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            has = file.schema_arrow.names
            _need_columns(path, has, columns)
            needed = list({_column(key, has) for key in columns})
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=needed).to_pylist():
                    number += 1
                    yield f"{path}: row {number}", number, row
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of them
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet, after row {number}: {reason}") from None


def _dataset(source: DataSource, key: str, columns: Sequence[str]) -> _Rows:
    name = str(source.data_path)
    datasets = _library("datasets", name)
    datasets.disable_progress_bars()
    is_saved = any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        found = (
            datasets.load_from_disk(name)
            if is_saved
            else datasets.load_dataset(name, source.subset, split=source.split)
        )
    except Exception as error:  # the library, and the hub's client below it, raise a dozen kinds
        where = "cannot be read" if Path(name).is_dir() else "is no file or folder here, and cannot be had from the hub"
        raise UserError(f"{key}.data_path: {name} {where}: {_reason(error)}") from None
    if isinstance(found, dict):
        if source.split not in found:
            raise UserError(f"{key}.split: {name} has {', '.join(found)}, not {source.split or 'null'}")
        found = found[source.split]
    elif is_saved and source.split not in (None, str(found.split)):
        raise UserError(f"{key}.split: {name} is a data set without splits: leave {source.split} out")
    has = found.column_names
    _need_columns(name, has, columns)
    number = 0
    try:
        for batch in found.select_columns(list({_column(key, has) for key in columns})).iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{name}: row {number}", number, dict(zip(batch, values, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: rows {number + 1} to {number + _BATCH}: text that is not UTF-8: {error}") from None


def _reason(error: BaseException) -> str:
    """Return the first lines of the error and of its causes: `datasets` names a file's fault only in the last."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return reason if error.__cause__ is None else f"{reason}: {_reason(error.__cause__)}"


def _column(key: str, has: Iterable[str]) -> str:
    """The column that a key is in: its own, or the one before its first dot."""
    return key if key in has else key.partition(".")[0]


def _need_columns(name: str | Path, has: Iterable[str], columns: Sequence[str]) -> None:
    for column in columns:
        if _column(column, has) not in has:
            raise UserError(f"{name}: there is no column {column!r} (columns: {', '.join(has) or 'none'})")


def _library(module: str, name: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{name}: {package} reads it, which is not installed: install slurmkit[train]") from None
