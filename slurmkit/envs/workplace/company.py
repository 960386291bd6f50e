"""A made-up company, for when its databases cannot be had from anywhere: it follows from a seed alone."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import lru_cache
from random import Random
from typing import Any

from slurmkit.envs.workplace.values import MISSING
from slurmkit.envs.workplace.world import World

BOARDS = ("Back end", "Front end", "Design")
LISTS = ("Backlog", "In Progress", "In Review", "Completed")
STATUSES = ("Qualified", "Won", "Lost", "Lead", "Proposal")
PRODUCTS = ("Software", "Hardware", "Services", "Consulting", "Training")
SOURCES = ("direct", "referral", "search engine", "social media")
_EMPLOYEES = (
    ("Amara", "Obi"), ("Bela", "Horvath"), ("Chidi", "Eze"), ("Dana", "Weiss"), ("Elif", "Kaya"), ("Farid", "Nazari"),
    ("Greta", "Lund"), ("Hugo", "Marin"), ("Ines", "Costa"), ("Jonas", "Berg"), ("Keiko", "Mori"), ("Liam", "Doyle"),
    ("Mila", "Novak"), ("Noor", "Haddad"), ("Otto", "Braun"), ("Priya", "Nair"), ("Quentin", "Roux"), ("Rosa", "Vidal"),
    ("Sven", "Dahl"), ("Tara", "Singh"),
)  # fmt: skip
_FIRST = ("Alba", "Boris", "Clara", "Dario", "Edith", "Felix", "Gwen", "Henri", "Isla", "Jasper", "Kira", "Lewis")
_LAST = ("Arden", "Bloom", "Crane", "Drake", "Ellis", "Frost", "Grant", "Hale", "Irwin", "Jarvis", "Knox", "Lowe")
_FIRMS = ("orchardworks", "bluequarry", "tinharbour", "fernwright", "palegate", "copperlane")
_SUBJECTS = ("Budget", "Roadmap", "Hiring", "Invoice", "Launch", "Metrics", "Offsite", "Security", "Survey", "Travel")
_ASPECTS = ("draft", "figures", "notes", "plan", "question", "review")
_MEETINGS = ("planning", "retrospective", "demo", "interview", "workshop", "catch-up")
_VERBS = ("Fix", "Design", "Test", "Rewrite", "Document", "Measure")
_THINGS = ("login page", "search box", "price list", "data export", "mail queue", "start screen", "test suite", "icons")
_NOTES = ("Asked for a quote.", "Saw the demo.", "Wants a call.", "Met at the fair.")


@lru_cache(maxsize=4)
def make_world(seed: int) -> World:
    """200 emails, 150 events, 400 visits, 150 tasks and 140 customers of a company of 20.

    Times are up to three months before 2023-11-30 for what has been, and up to five weeks after for what is to be.
    """
    rng = Random(f"company {seed}")
    addresses = tuple(f"{first}.{last}@larkfield.com".lower() for first, last in _EMPLOYEES)
    names = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], 140)
    rows = {
        "emails": [_email(rng, number, *who) for number, who in _numbered(rng, 200, addresses)],
        "calendar_events": [_event(rng, number, *who) for number, who in _numbered(rng, 150, addresses)],
        "analytics_data": [_visit(rng) for _ in range(400)],
        "project_tasks": [_task(rng, number, *who) for number, who in _numbered(rng, 150, addresses)],
        "customer_relationship_manager_data": [
            _customer(rng, number, address, name)
            for (number, (address, _)), name in zip(_numbered(rng, 140, addresses), names, strict=True)
        ],
    }
    for name, column in (("emails", "sent_datetime"), ("calendar_events", "event_start")):
        rows[name].sort(key=lambda row: row[column])  # called at once
    rows["analytics_data"].sort(key=lambda row: row["date_of_visit"])
    return World.of(rows, addresses)


def _numbered(rng: Random, count: int, addresses: tuple[str, ...]) -> list[tuple[str, tuple[str, str]]]:
    """Ids in no order, each with somebody's address and first name."""
    people = [(address, first) for address, (first, _) in zip(addresses, _EMPLOYEES, strict=True)]
    return [(f"{number:08}", rng.choice(people)) for number in rng.sample(range(count), count)]


def _moment(rng: Random, first: int, last: int) -> datetime:
    """A half hour between 9:00 and 16:30, so many days after 2023-11-30."""
    day = datetime(2023, 11, 30) + timedelta(days=rng.randint(first, last))
    return day + timedelta(minutes=30 * rng.randint(18, 33))


def _email(rng: Random, number: str, address: str, first: str) -> dict[str, Any]:
    subject = f"{rng.choice(_SUBJECTS)} {rng.choice(_ASPECTS)}"
    return {
        "email_id": number,
        "inbox/outbox": rng.choice(("inbox", "inbox", "outbox")),
        "sender/recipient": address,
        "subject": subject,
        "sent_datetime": str(_moment(rng, -60, -1) + timedelta(seconds=rng.randint(1, 1799))),
        "body": f"Please look at the {subject.lower()}. {first}",
    }


def _event(rng: Random, number: str, address: str, first: str) -> dict[str, Any]:
    return {
        "event_id": number,
        "event_name": f"{rng.choice(_SUBJECTS)} {rng.choice(_MEETINGS)}",
        "participant_email": address,
        "event_start": str(_moment(rng, -60, 35)),
        "duration": rng.choice(("30", "60", "90")),
    }


def _visit(rng: Random) -> dict[str, Any]:
    return {
        "date_of_visit": str(_moment(rng, -90, -1).date()),
        "visitor_id": f"{rng.randrange(10_000):04}",
        "page_views": str(rng.randint(1, 20)),
        "session_duration_seconds": str(rng.randint(1, 60)),
        "traffic_source": rng.choice(SOURCES),
        "user_engaged": rng.choice(("True", "False")),
    }


def _task(rng: Random, number: str, address: str, first: str) -> dict[str, Any]:
    return {
        "task_id": number,
        "task_name": f"{rng.choice(_VERBS)} {rng.choice(_THINGS)}",
        "assigned_to_email": address,
        "list_name": rng.choice(LISTS),
        "due_date": str(_moment(rng, -20, 30).date()),
        "board": rng.choice(BOARDS),
    }


def _customer(rng: Random, number: str, address: str, name: str) -> dict[str, Any]:
    contact = _moment(rng, -60, 0)
    return {
        "customer_id": number,
        "assigned_to_email": address,
        "customer_name": name,
        "customer_email": f"{name.lower().replace(' ', '.')}@{rng.choice(_FIRMS)}.com",
        "customer_phone": MISSING if rng.random() < 0.2 else f"555-{rng.randrange(10_000):04}",
        "last_contact_date": str(contact.date()),
        "product_interest": rng.choice(PRODUCTS),
        "status": rng.choice(STATUSES),
        "follow_up_by": str((contact + timedelta(days=rng.randint(7, 40))).date()),
        "notes": f"{contact.date()}: {rng.choice(_NOTES)}",
    }
