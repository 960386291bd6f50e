"""The databases that all episodes start from: read once, from a folder or made up."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurmkit.envs.workplace.table import Table
from slurmkit.envs.workplace.values import cell
from slurmkit.errors import UserError

COLUMNS = {
    "emails": ("email_id", "inbox/outbox", "sender/recipient", "subject", "sent_datetime", "body"),
    "calendar_events": ("event_id", "event_name", "participant_email", "event_start", "duration"),
    "analytics_data": (
        "date_of_visit",
        "visitor_id",
        "page_views",
        "session_duration_seconds",
        "traffic_source",
        "user_engaged",
    ),
    "project_tasks": ("task_id", "task_name", "assigned_to_email", "list_name", "due_date", "board"),
    "customer_relationship_manager_data": (
        "customer_id",
        "assigned_to_email",
        "customer_name",
        "customer_email",
        "customer_phone",
        "last_contact_date",
        "product_interest",
        "status",
        "follow_up_by",
        "notes",
    ),
}
"""Of each database's file, NAME.csv, in WorkBench's order."""
_ADDRESSES = "email_addresses.csv"


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """What a fresh episode finds. `tables` are by the names of `COLUMNS`."""

    tables: Mapping[str, Table]
    addresses: tuple[str, ...]
    """The company's directory."""

    @classmethod
    def of(cls, rows: Mapping[str, list[dict[str, Any]]], addresses: tuple[str, ...]) -> World:
        """From rows of text."""
        visits = [{**row, "user_engaged": row["user_engaged"] == "True"} for row in rows["analytics_data"]]
        every = {**rows, "analytics_data": visits}
        return cls({name: Table.of(columns, every[name]) for name, columns in COLUMNS.items()}, addresses)

    @classmethod
    def read(cls, folder: Path) -> World:
        """WorkBench's files, or NeMo Gym's. UserError that names the file, and the column or line at fault."""
        rows = {name: _rows(folder / f"{name}.csv", columns) for name, columns in COLUMNS.items()}
        addresses = tuple(line for line in _text(folder / _ADDRESSES).split("\n") if line.strip())
        return cls.of(rows, addresses)

    def write(self, folder: Path) -> None:
        """The files that `read` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, columns in COLUMNS.items():
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns)
                writer.writerows([record[column] for column in columns] for record in self.tables[name].records())
        (folder / _ADDRESSES).write_text("".join(f"{address}\n" for address in self.addresses))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"env.workplace.databases: {path} cannot be read: {reason}") from None


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    _text(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if sorted(header) != sorted(columns):
            raise UserError(
                f"env.workplace.databases: {path} must have the columns {', '.join(columns)}, found "
                f"{', '.join(header) or 'none'}"
            )
        rows = []
        for fields in reader:
            if len(fields) != len(columns):
                place = f"{path}:{reader.line_num}"
                raise UserError(f"env.workplace.databases: {place}: {len(fields)} fields, not {len(columns)}")
            found = dict(zip(header, map(cell, fields), strict=True))
            rows.append({column: found[column] for column in columns})
    if not rows:
        raise UserError(f"env.workplace.databases: {path} holds no row")
    return rows
