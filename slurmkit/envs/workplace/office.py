"""The tools of website analytics, of project management and of customers. As in `tools`, all names are NeMo Gym's."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping
from math import fsum
from typing import Any

from slurmkit.envs.workplace.table import Table
from slurmkit.envs.workplace.tools import page_of
from slurmkit.envs.workplace.values import Refused

_VALUES = (
    "total_visits",
    "session_duration_seconds",
    "user_engaged",
    "visits_direct",
    "visits_referral",
    "visits_search_engine",
    "visits_social_media",
)
_PLOTS = ("bar", "line", "scatter", "histogram")
_ADDRESS = re.compile(r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}\n?")
_CHOICES = {
    "list_name": ("Backlog", "In Progress", "In Review", "Completed"),
    "board": ("Back end", "Front end", "Design"),
    "status": ("Qualified", "Won", "Lost", "Lead", "Proposal"),
    "product_interest": ("Software", "Hardware", "Services", "Consulting", "Training"),
}
_CUSTOMER_FIELDS = (
    "customer_name",
    "assigned_to_email",
    "customer_email",
    "customer_phone",
    "last_contact_date",
    "product_interest",
    "status",
    "notes",
    "follow_up_by",
)
_BAD_ASSIGNEE = Refused("Assignee email not valid. Please choose from the list of team members.")


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names)


class AnalyticsTool:
    """Visits of the company's website, and the plots that were made of them."""

    def __init__(self, visits: Table, plots: Table) -> None:
        self._visits = visits
        self.table = plots
        self._is_converted = False

    def get_visitor_information_by_id(self, visitor_id: Any = None) -> Any:
        if not visitor_id:
            return Refused("Visitor ID not provided.")
        found = self._visits.where("visitor_id", visitor_id)
        if self._is_converted:
            found = [{**visit, "session_duration_seconds": _seconds(visit)} for visit in found]
        return found or Refused("Visitor not found.")

    def create_plot(
        self, time_min: Any = None, time_max: Any = None, value_to_plot: Any = None, plot_type: Any = None
    ) -> Any:
        if not time_min:
            return Refused("Start date not provided.")
        if not time_max:
            return Refused("End date not provided.")
        if value_to_plot not in _VALUES:
            return Refused(f"Value to plot must be one of {_quoted(_VALUES)}")
        if plot_type not in _PLOTS:
            return Refused(f"Plot type must be one of {_quoted(_PLOTS[:-1])}, or {_quoted(_PLOTS[-1:])}")
        path = f"plots/{time_min}_{time_max}_{value_to_plot}_{plot_type}.png"
        self.table = self.table.extended({"file_path": path}, renumber=True)
        return path

    def total_visits_count(self, time_min: Any = None, time_max: Any = None) -> Any:
        return _by_day(Counter(visit["date_of_visit"] for visit in self._between(time_min, time_max)))

    def engaged_users_count(self, time_min: Any = None, time_max: Any = None) -> Any:
        counts: Counter[str] = Counter()
        for visit in self._between(time_min, time_max):
            counts[visit["date_of_visit"]] += visit["user_engaged"]
        return _by_day(counts)

    def traffic_source_count(self, time_min: Any = None, time_max: Any = None, traffic_source: Any = None) -> Any:
        visits = self._between(time_min, time_max)
        if isinstance(traffic_source, list) and traffic_source:
            raise ValueError("Lengths must match to compare", (len(visits),), (len(traffic_source),))
        counts: Counter[str] = Counter()
        for visit in visits:
            counts[visit["date_of_visit"]] += not traffic_source or visit["traffic_source"] == traffic_source
        return _by_day(counts)

    def get_average_session_duration(self, time_min: Any = None, time_max: Any = None) -> Any:
        visits = self._between(time_min, time_max)
        # There, an average over everything leaves numbers where text was, for the rest of the episode.
        self._is_converted = self._is_converted or not (time_min or time_max)
        seconds: dict[str, list[float]] = {}
        for visit in visits:
            seconds.setdefault(visit["date_of_visit"], []).append(_seconds(visit))
        return _by_day({date: fsum(each) / len(each) for date, each in seconds.items()})

    def _between(self, time_min: Any, time_max: Any) -> list[dict[str, Any]]:
        visits = self._visits
        if time_min:
            visits = visits.compared("date_of_visit", operator.ge, time_min)
        if time_max:
            visits = visits.compared("date_of_visit", operator.le, time_max)
        return visits.records()


def _seconds(visit: Mapping[str, Any]) -> float:
    return float(visit["session_duration_seconds"])


def _by_day(figures: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(figures.items()))


class ProjectManagementTool:
    """The software team's tasks."""

    def __init__(self, tasks: Table) -> None:
        self.table = tasks

    def get_task_information_by_id(self, task_id: Any = None, field: Any = None) -> Any:
        if not task_id:
            return Refused("Task ID not provided.")
        if not field:
            return Refused("Field not provided.")
        found = self.table.where("task_id", task_id)
        if not found:
            return Refused("Task not found.")
        return {field: found[0][field]} if field in found[0] else Refused("Field not found.")

    def search_tasks(
        self,
        task_name: Any = None,
        assigned_to_email: Any = None,
        list_name: Any = None,
        due_date: Any = None,
        board: Any = None,
    ) -> Any:
        if not any([task_name, assigned_to_email, list_name, due_date, board]):
            return Refused("No search parameters provided.")
        if assigned_to_email and not _ADDRESS.fullmatch(assigned_to_email):
            return Refused("Invalid email format for assigned_to_email.")
        tasks = self.table
        if task_name:
            tasks = tasks.containing("task_name", task_name)
        if assigned_to_email:
            # Not by regular expression, other than the rest.
            tasks = tasks.compared("assigned_to_email", _same_but_for_case, assigned_to_email)
        for column, pattern in (("list_name", list_name), ("due_date", due_date), ("board", board)):
            if pattern:
                tasks = tasks.containing(column, pattern)
        return tasks.records()

    def create_task(
        self,
        task_name: Any = None,
        assigned_to_email: Any = None,
        list_name: Any = None,
        due_date: Any = None,
        board: Any = None,
    ) -> Any:
        if not all([task_name, assigned_to_email, list_name, due_date, board]):
            return Refused("Missing task details.")
        assigned_to_email = assigned_to_email.lower()
        if not self._has_member(assigned_to_email):
            return _BAD_ASSIGNEE
        wrong = _no_choice("List", "list_name", list_name) or _no_choice("Board", "board", board)
        if wrong:
            return wrong
        task = {
            "task_id": str(self.table.next_id("task_id")).zfill(8),
            "task_name": task_name,
            "assigned_to_email": assigned_to_email,
            "list_name": list_name,
            "due_date": due_date,
            "board": board,
        }
        self.table = self.table.extended(task, renumber=True)
        return task["task_id"]

    def delete_task(self, task_id: Any = None) -> Any:
        if not task_id:
            return Refused("Task ID not provided.")
        if not self.table.holds("task_id", task_id):
            return Refused("Task not found.")
        self.table = self.table.without("task_id", task_id)
        return "Task deleted successfully."

    def update_task(self, task_id: Any = None, field: Any = None, new_value: Any = None) -> Any:
        if not task_id or not field or not new_value:
            return Refused("Task ID, field, or new value not provided.")
        if field == "assigned_to_email":
            new_value = new_value.lower()
        wrong = _no_choice("Board", "board", new_value) if field == "board" else None
        wrong = _no_choice("List", "list_name", new_value) if field == "list_name" else wrong
        if wrong:
            return wrong
        if field == "assigned_to_email" and not self._has_member(new_value):
            return _BAD_ASSIGNEE
        if not self.table.holds("task_id", task_id):
            return Refused("Task not found.")
        if field not in frozenset(self.table.columns):
            return Refused("Field not valid.")
        self.table = self.table.updated("task_id", task_id, field, new_value)
        return "Task updated successfully."

    def _has_member(self, address: str) -> bool:
        """Whoever has a task is of the team."""
        return any(_same_but_for_case(row.values["assigned_to_email"], address) for row in self.table.rows)


def _same_but_for_case(cell: Any, address: str) -> bool:
    return isinstance(cell, str) and cell.lower() == address.lower()


def _no_choice(what: str, column: str, value: Any) -> Refused | None:
    choices = _CHOICES[column]
    return None if value in choices else Refused(f"{what} not valid. Please choose from: {_quoted(choices)}.")


class CustomerRelationshipManagerTool:
    """The sales team's customers."""

    def __init__(self, customers: Table) -> None:
        self.table = customers

    def search_customers(
        self,
        customer_name: Any = None,
        customer_email: Any = None,
        product_interest: Any = None,
        status: Any = None,
        assigned_to_email: Any = None,
        last_contact_date_min: Any = None,
        last_contact_date_max: Any = None,
        follow_up_by_min: Any = None,
        follow_up_by_max: Any = None,
        page: Any = 1,
        page_size: Any = 5,
    ) -> Any:
        patterns = {
            "customer_name": customer_name,
            "customer_email": customer_email,
            "product_interest": product_interest,
            "status": status,
            "assigned_to_email": assigned_to_email,
        }
        bounds = (
            ("last_contact_date", operator.ge, last_contact_date_min),
            ("last_contact_date", operator.le, last_contact_date_max),
            ("follow_up_by", operator.ge, follow_up_by_min),
            ("follow_up_by", operator.le, follow_up_by_max),
        )
        if not any([*patterns.values(), *(bound for _, _, bound in bounds)]):
            return Refused("No search parameters provided. Please provide at least one parameter.")
        customers = self.table
        for column, pattern in patterns.items():
            if pattern:
                customers = customers.containing(column, pattern)
        for column, compare, bound in bounds:
            if bound:
                customers = customers.compared(column, compare, bound)
        found = page_of("customers", customers.records(), page, page_size)
        return found if customers.rows else "No customers found."

    def update_customer(self, customer_id: Any = None, field: Any = None, new_value: Any = None) -> Any:
        if not customer_id or not field or not new_value:
            return Refused("Customer ID, field, or new value not provided.")
        for column, what in (("status", "Status"), ("product_interest", "Product interest")):
            if field == column and new_value not in _CHOICES[column]:
                return Refused(f"{what} not valid. Please choose from: {_quoted(_CHOICES[column])}")
        if field in ("customer_email", "assigned_to_email"):
            new_value = new_value.lower()
        if not self.table.holds("customer_id", customer_id):
            return Refused("Customer not found.")
        if field not in frozenset(self.table.columns):
            return Refused(f"Field not valid. Please choose from: {_quoted(_CUSTOMER_FIELDS)}")
        self.table = self.table.updated("customer_id", customer_id, field, new_value)
        return "Customer updated successfully."

    def add_customer(
        self,
        customer_name: Any = None,
        assigned_to_email: Any = None,
        status: Any = None,
        customer_email: Any = None,
        customer_phone: Any = None,
        last_contact_date: Any = None,
        product_interest: Any = None,
        notes: Any = "",
        follow_up_by: Any = None,
    ) -> Any:
        if not all([customer_name, assigned_to_email, status]):
            return Refused("Please provide all required fields: customer_name, assigned_to_email, status.")
        customer = {
            "assigned_to_email": assigned_to_email.lower(),
            "customer_email": customer_email.lower() if customer_email else customer_email,
            "customer_id": str(self.table.next_id("customer_id")).zfill(8),
            "customer_name": customer_name,
            "customer_phone": customer_phone,
            "last_contact_date": last_contact_date,
            "product_interest": product_interest,
            "status": status,
            "notes": notes,
            "follow_up_by": follow_up_by,
        }
        self.table = self.table.extended(customer, renumber=True)
        return customer["customer_id"]

    def delete_customer(self, customer_id: Any = None) -> Any:
        if not customer_id:
            return Refused("Customer ID not provided.")
        if not self.table.holds("customer_id", customer_id):
            return Refused("Customer not found.")
        self.table = self.table.without("customer_id", customer_id)
        return "Customer deleted successfully."
