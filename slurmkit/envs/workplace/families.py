"""Kinds of tasks over any company: what the user says, and the calls of somebody who does it.

Every family searches before it acts, as ids are in no prompt; some depend on what is found, some need several of the
databases. A family gives None where its draw does not come to a task, as where two customers share a name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from slurmkit.envs.workplace.company import BOARDS, LISTS, STATUSES
from slurmkit.envs.workplace.scoring import Call
from slurmkit.envs.workplace.world import World

_TEXTS = ("Thank you, I will look into it.", "Let us talk tomorrow.", "This is done.", "Please send me the latest.")
_TITLES = ("Status update", "Next steps", "Open questions", "Numbers")


class Draft(NamedTuple):
    """A task in the making."""

    question: str
    calls: tuple[Call, ...]
    """All of them, those that only look included."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What families draw from."""

    world: World
    rng: Random

    def record(self, table: str) -> Mapping[str, Any]:
        """Any row of a database."""
        return self.rng.choice(self.world.tables[table].rows).values

    def address(self) -> str:
        """Any employee's."""
        return self.rng.choice(self.world.addresses)

    def all(self, table: str) -> list[Mapping[str, Any]]:
        """All rows."""
        return [row.values for row in self.world.tables[table].rows]

    def start(self) -> str:
        """A time for a meeting, in the first three weeks of December."""
        return f"2023-12-{self.rng.randint(1, 21):02} {self.rng.randint(9, 16):02}:00:00"


def call(tool: str, /, **arguments: str | int) -> Call:
    """A call with its arguments as text."""
    return tool, json.dumps(arguments)


def first_name(address: str) -> str:
    """Example: amara.obi@larkfield.com is Amara."""
    return address.split(".")[0].capitalize()


def _find(address: str) -> Call:
    return call("company_directory_find_email_address", name=first_name(address))


def _latest_email(draw: Draw) -> tuple[str, Call, str]:
    """Whose, the search that finds it, and its id."""
    address = draw.address()
    name = first_name(address).lower()
    emails = [email for email in draw.all("emails") if name in f"{email['sender/recipient']} {email['body']}".lower()]
    if not emails or any(email["sender/recipient"] != address for email in emails):
        return "", call(""), ""
    latest = max(emails, key=lambda email: email["sent_datetime"])
    search = call("email_search_emails", query=first_name(address), page_size=1)
    return first_name(address), search, latest["email_id"]


def _delete_email(draw: Draw) -> Draft | None:
    name, search, email_id = _latest_email(draw)
    question = f"Delete the latest email with {name}."
    return Draft(question, (search, call("email_delete_email", email_id=email_id))) if name else None


def _reply(draw: Draw) -> Draft | None:
    name, search, email_id = _latest_email(draw)
    text = draw.rng.choice(_TEXTS)
    reply = call("email_reply_email", email_id=email_id, body=text)
    return Draft(f"Answer the latest email with {name}: '{text}'", (search, reply)) if name else None


def _forward(draw: Draw) -> Draft | None:
    name, search, email_id = _latest_email(draw)
    to = draw.address()
    calls = (search, _find(to), call("email_forward_email", email_id=email_id, recipient=to))
    question = f"Forward the latest email with {name} to {first_name(to)}."
    return Draft(question, calls) if name and name != first_name(to) else None


def _last_event(draw: Draw) -> tuple[str, Call, str]:
    address = draw.address()
    events = [event for event in draw.all("calendar_events") if event["participant_email"] == address]
    starts = sorted(event["event_start"] for event in events)
    if not starts or starts.count(starts[-1]) > 1:
        return "", call(""), ""
    last = max(events, key=lambda event: event["event_start"])
    search = call("calendar_search_events", query=first_name(address), page_size=1)
    return first_name(address), search, last["event_id"]


def _cancel_event(draw: Draw) -> Draft | None:
    name, search, event_id = _last_event(draw)
    question = f"Cancel the last meeting with {name}."
    return Draft(question, (search, call("calendar_delete_event", event_id=event_id))) if name else None


def _move_event(draw: Draw) -> Draft | None:
    name, search, event_id = _last_event(draw)
    start = draw.start()
    move = call("calendar_update_event", event_id=event_id, field="event_start", new_value=start)
    return Draft(f"Move the last meeting with {name} to {start}.", (search, move)) if name else None


def _customer(draw: Draw) -> tuple[Mapping[str, Any], Call]:
    customer = draw.record("customer_relationship_manager_data")
    name = customer["customer_name"]
    return customer, call("customer_relationship_manager_search_customers", customer_name=name, page_size=1)


def _update_customer(customer: Mapping[str, Any], field: str, value: str) -> Call:
    ids = {"customer_id": customer["customer_id"]}
    return call("customer_relationship_manager_update_customer", **ids, field=field, new_value=value)


def _set_status(draw: Draw) -> Draft | None:
    customer, search = _customer(draw)
    status = draw.rng.choice([each for each in STATUSES if each != customer["status"]])
    question = f"Set the status of {customer['customer_name']} to {status}."
    return Draft(question, (search, _update_customer(customer, "status", status)))


def _take_over(draw: Draw) -> Draft | None:
    customer, search = _customer(draw)
    to = draw.address()
    calls = (search, _find(to), _update_customer(customer, "assigned_to_email", to))
    question = f"{first_name(to)} takes over {customer['customer_name']}. Reassign them."
    return Draft(question, calls) if customer["assigned_to_email"] != to else None


def _status_depends(draw: Draw) -> Draft | None:
    customer, search = _customer(draw)
    asked, then, otherwise = draw.rng.sample(STATUSES, 3)
    status = then if customer["status"] == asked else otherwise
    name = customer["customer_name"]
    question = f"If {name} is at {asked}, set their status to {then}, otherwise to {otherwise}."
    calls = (search, _update_customer(customer, "status", status))
    return Draft(question, calls) if customer["status"] != status else None


def _book_contact(draw: Draw) -> Draft | None:
    customer, search = _customer(draw)
    start, title = draw.start(), draw.rng.choice(_TITLES)
    book = call(
        "calendar_create_event",
        event_name=title,
        participant_email=customer["assigned_to_email"],
        event_start=start,
        duration="30",
    )
    who = f"whoever looks after {customer['customer_name']}"
    return Draft(f"Book 30 minutes called '{title}' with {who} at {start}.", (search, book))


def _task(draw: Draw) -> tuple[Mapping[str, Any], Call] | None:
    task = draw.record("project_tasks")
    alike = [each for each in draw.all("project_tasks") if task["task_name"] in each["task_name"]]
    return (task, call("project_management_search_tasks", task_name=task["task_name"])) if len(alike) == 1 else None


def _move_task(draw: Draw) -> Draft | None:
    found = _task(draw)
    if found is None:
        return None
    task, search = found
    to = draw.rng.choice([each for each in LISTS if each != task["list_name"]])
    move = call("project_management_update_task", task_id=task["task_id"], field="list_name", new_value=to)
    return Draft(f"Move the task '{task['task_name']}' to {to}.", (search, move))


def _create_task(draw: Draw) -> Draft | None:
    address, board = draw.address(), draw.rng.choice(BOARDS)
    if all(task["assigned_to_email"] != address for task in draw.all("project_tasks")):
        return None  # not of the team
    due, name = draw.start()[:10], f"Check {draw.rng.choice(_TITLES).lower()}"
    create = call(
        "project_management_create_task",
        task_name=name,
        assigned_to_email=address,
        list_name="Backlog",
        due_date=due,
        board=board,
    )
    question = f"Add '{name}' to {first_name(address)}'s backlog on the {board} board, due {due}."
    return Draft(question, (_find(address), create))


def _clear_list(draw: Draw) -> Draft | None:
    address, board, name = draw.address(), draw.rng.choice(BOARDS), draw.rng.choice(LISTS)
    wanted = {"assigned_to_email": address, "list_name": name, "board": board}
    tasks = [task for task in draw.all("project_tasks") if all(task[key] == value for key, value in wanted.items())]
    deletions = [call("project_management_delete_task", task_id=task["task_id"]) for task in tasks]
    search = call("project_management_search_tasks", **wanted)
    question = f"Delete all tasks of {first_name(address)} that are in {name} on the {board} board."
    return Draft(question, (_find(address), search, *deletions)) if 1 <= len(tasks) <= 3 else None


def _remind(draw: Draw) -> Draft | None:
    address, name = draw.address(), draw.rng.choice(LISTS[:3])
    text = draw.rng.choice(_TEXTS)
    wanted = {"assigned_to_email": address, "list_name": name}
    has_any = any(all(task[key] == value for key, value in wanted.items()) for task in draw.all("project_tasks"))
    send = call("email_send_email", recipient=address, subject="Tasks", body=text)
    meeting = {"event_name": "Tasks", "participant_email": address, "event_start": "2023-12-01 09:00:00"}
    act = send if has_any else call("calendar_create_event", **meeting, duration="30")
    who = first_name(address)
    question = (
        f"If {who} has a task in {name}, send them the email '{text}' with the subject 'Tasks'. If not, book 30 "
        "minutes called 'Tasks' with them tomorrow at 9:00."
    )
    return Draft(question, (_find(address), call("project_management_search_tasks", **wanted), act))


def _plot(draw: Draw) -> Draft | None:
    kind = draw.rng.choice(("bar", "line", "scatter"))
    first, last = sorted(f"2023-{draw.rng.randint(9, 11):02}-{draw.rng.randint(1, 29):02}" for _ in range(2))
    what = {"time_min": first, "time_max": last}
    plot = call("analytics_create_plot", **what, value_to_plot="total_visits", plot_type=kind)
    question = f"Make a {kind} chart of total visits from {first} to {last}."
    return Draft(question, (call("analytics_total_visits_count", **what), plot)) if first < last else None


FAMILIES: Mapping[str, Callable[[Draw], Draft | None]] = {
    "delete-email": _delete_email,
    "reply": _reply,
    "forward": _forward,
    "cancel-event": _cancel_event,
    "move-event": _move_event,
    "set-status": _set_status,
    "take-over": _take_over,
    "status-depends": _status_depends,
    "book-contact": _book_contact,
    "move-task": _move_task,
    "create-task": _create_task,
    "clear-list": _clear_list,
    "remind": _remind,
    "plot": _plot,
}
