"""One employee's desk in one episode: all tools, over databases that are the world's until they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slurmkit.envs.workplace.office import AnalyticsTool, CustomerRelationshipManagerTool, ProjectManagementTool
from slurmkit.envs.workplace.table import Table
from slurmkit.envs.workplace.tools import CalendarTool, CompanyDirectoryTool, EmailTool
from slurmkit.envs.workplace.values import Refused
from slurmkit.envs.workplace.world import World

_PLOTS = Table.of(("file_path",), ())
_KITS = {
    "company_directory": CompanyDirectoryTool,
    "email": EmailTool,
    "calendar": CalendarTool,
    "analytics": AnalyticsTool,
    "project_management": ProjectManagementTool,
    "customer_relationship_manager": CustomerRelationshipManagerTool,
}
_METHODS = {
    f"{kit}_{method}": (kit, method)
    for kit, tool in _KITS.items()
    for method in vars(tool)
    if not method.startswith("_")
}
_WRITES = ("send", "delete", "forward", "reply", "create", "update", "add")


class Desk:
    """Tools under their names, as email_send_email, and the tables as they have left them."""

    __slots__ = ("_kits",)

    def __init__(self, world: World) -> None:
        tables = world.tables
        self._kits: dict[str, Any] = {
            "company_directory": CompanyDirectoryTool(world.addresses),
            "email": EmailTool(tables["emails"]),
            "calendar": CalendarTool(tables["calendar_events"]),
            "analytics": AnalyticsTool(tables["analytics_data"], _PLOTS),
            "project_management": ProjectManagementTool(tables["project_tasks"]),
            "customer_relationship_manager": CustomerRelationshipManagerTool(
                tables["customer_relationship_manager_data"]
            ),
        }

    @property
    def tables(self) -> tuple[Table, ...]:
        """The state that episodes are judged by: emails, events, plots, tasks, customers."""
        return tuple(kit.table for name, kit in self._kits.items() if name != "company_directory")

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the tool answers, `Refused` where it did nothing. Exceptions are those of NeMo Gym's own tools."""
        kit, method = _METHODS[name]
        return getattr(self._kits[kit], method)(**arguments)

    def answer(self, name: str, arguments: Mapping[str, Any]) -> tuple[Any, bool]:
        """What a model is told, and whether the tool did what it was asked."""
        given = {key: value for key, value in arguments.items() if value is not None}
        try:
            found = self.call(name, given)
        except Exception as error:  # a model's arguments are anything
            return f"Error executing tool '{name}': {error}", False
        return found, not isinstance(found, Refused)


def changes_something(name: str) -> bool:
    """Whether a tool may change a database, by its name."""
    return any(f"_{verb}_" in name for verb in _WRITES)


def as_text(found: Any) -> str:
    """A tool's answer as NeMo Gym's server sends it: compact JSON, empty cells null."""
    return json.dumps({"output": _plain(found)}, ensure_ascii=False, separators=(",", ":"))


def _plain(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _plain(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_plain(value) for value in found]
    return None if found != found else found
