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
from slurmkit.errors import UserError


class Row(NamedTuple):
    """One row's two texts. `name` is short, as rows.jsonl:7; `place` is what a message needs to find the row."""

    name: str
    place: str
    input: str
    output: str


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
        for field in (source.input_key, source.output_key):
            if not isinstance(row.get(field), str):
                raise UserError(f"{place}: the key {field!r} must hold text (keys: {', '.join(row) or 'none'})")
        yield Row(name, place, row[source.input_key], row[source.output_key])


def read_records(source: DataSource, key: str, columns: Sequence[str]) -> Iterator[Record]:
    """As `read_rows`, with values of any kind: of tables the `columns`, of JSON lines whatever there is."""
    assert source.data_path is not None  # the schema has seen to it
    path, found = Path(source.data_path), 0
    if path.is_dir() or (source.may_be_on_hub and not path.exists()):
        name, rows = path.name if path.is_dir() else source.data_path, _dataset(source, key, columns)
    elif path.suffix == ".parquet":
        name, rows = path.name, _parquet(path, columns)
    else:
        name, rows = path.name, _json_lines(path)
    for place, number, row in rows:
        yield Record(f"{name}:{number}", place, row)
        found += 1
    if not found:
        raise UserError(f"{source.data_path}: holds no task")


_Rows = Iterator[tuple[str, int, Mapping[str, Any]]]


def _json_lines(path: Path) -> _Rows:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
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
        if not isinstance(row, dict):
            raise UserError(f"{place}: must be a JSON object, found {type(row).__name__}")
        yield place, number, row


def _parquet(path: Path, columns: Sequence[str]) -> _Rows:
    parquet = _library("pyarrow.parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _need_columns(path, file.schema_arrow.names, columns)
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=list(columns)).to_pylist():
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}.data_path: {name} {where}: {reason}") from None
    if isinstance(found, dict):
        if source.split not in found:
            raise UserError(f"{key}.split: {name} has {', '.join(found)}, not {source.split or 'null'}")
        found = found[source.split]
    elif is_saved and source.split not in (None, str(found.split)):
        raise UserError(f"{key}.split: {name} is a data set without splits: leave {source.split} out")
    _need_columns(name, found.column_names, columns)
    number = 0
    for batch in found.select_columns(list(dict.fromkeys(columns))).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{name}: row {number}", number, dict(zip(batch, values, strict=True))


def _need_columns(name: str | Path, has: Iterable[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in has:
            raise UserError(f"{name}: there is no column {column!r} (columns: {', '.join(has) or 'none'})")


def _library(module: str, name: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{name}: {package} reads it, which is not installed: install slurmkit[train]") from None
