"""The 27 tools as a model is told of them: names and arguments are NeMo Gym's, the words are ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_PAGES = {"page": "integer: which page of what was found, from 1", "page_size": "integer: how many on a page, 5"}
_DAYS = {"time_min": "first day, YYYY-MM-DD", "time_max": "last day, YYYY-MM-DD"}
_TASK = {
    "task_name": "name of the task",
    "assigned_to_email": "address of who does it",
    "list_name": "'Backlog', 'In Progress', 'In Review' or 'Completed'",
    "due_date": "YYYY-MM-DD",
    "board": "'Back end', 'Front end' or 'Design'",
}
_EVENT = {
    "event_name": "what the event is called",
    "participant_email": "address of who takes part",
    "event_start": "YYYY-MM-DD HH:MM:SS",
    "duration": "minutes",
}
_CUSTOMER = {
    "customer_name": "name of the customer",
    "assigned_to_email": "address of who looks after them",
    "status": "'Qualified', 'Won', 'Lost', 'Lead' or 'Proposal'",
    "customer_email": "address of the customer",
    "customer_phone": "number of the customer",
    "last_contact_date": "YYYY-MM-DD",
    "product_interest": "'Software', 'Hardware', 'Services', 'Consulting' or 'Training'",
    "notes": "notes",
    "follow_up_by": "YYYY-MM-DD",
}
_SEARCHED = ("customer_name", "customer_email", "product_interest", "status", "assigned_to_email")
_BOUNDS = {
    "last_contact_date_min": "last contact on this day or later, YYYY-MM-DD",
    "last_contact_date_max": "last contact on this day or earlier, YYYY-MM-DD",
    "follow_up_by_min": "to be followed up on this day or later, YYYY-MM-DD",
    "follow_up_by_max": "to be followed up on this day or earlier, YYYY-MM-DD",
}
_EMAIL_ID = {"email_id": "id of the email"}
_EVENT_ID = {"event_id": "id of the event, 8 digits"}
_TASK_ID = {"task_id": "id of the task, 8 digits"}
_CUSTOMER_ID = {"customer_id": "id of the customer, 8 digits"}


def _field(names: str) -> dict[str, str]:
    return {"field": f"one of {names}"}


def _change(fields: Mapping[str, str]) -> dict[str, str]:
    return {"field": f"one of {', '.join(fields)}", "new_value": "what it is to be"}


def _function(name: str, description: str, required: Mapping[str, str], optional: Mapping[str, str]) -> dict[str, Any]:
    properties = {}
    for key, text in {**required, **optional}.items():
        is_integer = text.startswith("integer: ")
        properties[key] = {
            "type": "integer" if is_integer else "string",
            "description": text.removeprefix("integer: "),
        }
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"type": "function", "name": name, "description": description, "parameters": parameters, "strict": False}


_ALL: tuple[tuple[str, str, Mapping[str, str], Mapping[str, str]], ...] = (
    ("company_directory_find_email_address", "Find addresses that hold a name.", {}, {"name": "name, or part of it"}),
    (
        "email_get_email_information_by_id",
        "Read one field of an email.",
        {**_EMAIL_ID, **_field("email_id, inbox/outbox, sender/recipient, subject, sent_datetime, body")},
        {},
    ),
    (
        "email_search_emails",
        "Find emails that hold all words, latest first.",
        {},
        {
            "query": "words of the subject, the body or the address",
            "date_min": "sent on this day or later, YYYY-MM-DD",
            "date_max": "sent on this day or earlier, YYYY-MM-DD",
            **_PAGES,
        },
    ),
    (
        "email_send_email",
        "Send an email.",
        {"recipient": "address", "subject": "subject", "body": "text of the email"},
        {},
    ),
    ("email_delete_email", "Delete an email.", _EMAIL_ID, {}),
    ("email_forward_email", "Send an email on to somebody.", {**_EMAIL_ID, "recipient": "address"}, {}),
    ("email_reply_email", "Answer an email.", {**_EMAIL_ID, "body": "text of the answer"}, {}),
    (
        "calendar_get_event_information_by_id",
        "Read one field of an event.",
        {**_EVENT_ID, **_field("event_id, event_name, participant_email, event_start, duration")},
        {},
    ),
    (
        "calendar_search_events",
        "Find events, latest first.",
        {},
        {
            "query": "part of the name or of the participant's address",
            "time_min": "starts then or later, YYYY-MM-DD HH:MM:SS",
            "time_max": "starts then or earlier, YYYY-MM-DD HH:MM:SS",
            **_PAGES,
        },
    ),
    ("calendar_create_event", "Add an event.", _EVENT, {}),
    ("calendar_delete_event", "Delete an event.", _EVENT_ID, {}),
    ("calendar_update_event", "Change one field of an event.", {**_EVENT_ID, **_change(_EVENT)}, {}),
    (
        "analytics_get_visitor_information_by_id",
        "Read all visits of a visitor.",
        {"visitor_id": "id of the visitor"},
        {},
    ),
    (
        "analytics_create_plot",
        "Plot a figure over days.",
        {
            **_DAYS,
            "value_to_plot": "'total_visits', 'session_duration_seconds', 'user_engaged', 'visits_direct', "
            "'visits_referral', 'visits_search_engine' or 'visits_social_media'",
            "plot_type": "'bar', 'line', 'scatter' or 'histogram'",
        },
        {},
    ),
    ("analytics_total_visits_count", "Count visits by day.", {}, _DAYS),
    ("analytics_engaged_users_count", "Count engaged users by day.", {}, _DAYS),
    (
        "analytics_traffic_source_count",
        "Count visits of a source by day.",
        {},
        {**_DAYS, "traffic_source": "'direct', 'referral', 'search engine' or 'social media'"},
    ),
    ("analytics_get_average_session_duration", "Mean seconds of a visit by day.", {}, _DAYS),
    (
        "project_management_get_task_information_by_id",
        "Read one field of a task.",
        {**_TASK_ID, **_field("task_id, task_name, assigned_to_email, list_name, due_date, board")},
        {},
    ),
    ("project_management_search_tasks", "Find tasks.", {}, _TASK),
    ("project_management_create_task", "Add a task.", _TASK, {}),
    ("project_management_delete_task", "Delete a task.", _TASK_ID, {}),
    ("project_management_update_task", "Change one field of a task.", {**_TASK_ID, **_change(_TASK)}, {}),
    (
        "customer_relationship_manager_search_customers",
        "Find customers.",
        {},
        {**{key: _CUSTOMER[key] for key in _SEARCHED}, **_BOUNDS, **_PAGES},
    ),
    (
        "customer_relationship_manager_update_customer",
        "Change one field of a customer.",
        {**_CUSTOMER_ID, **_change(_CUSTOMER)},
        {},
    ),
    (
        "customer_relationship_manager_add_customer",
        "Add a customer.",
        {key: _CUSTOMER[key] for key in ("customer_name", "assigned_to_email", "status")},
        {key: text for key, text in _CUSTOMER.items() if key not in ("customer_name", "assigned_to_email", "status")},
    ),
    ("customer_relationship_manager_delete_customer", "Delete a customer.", _CUSTOMER_ID, {}),
)

DEFINITIONS: Mapping[str, Mapping[str, Any]] = {each[0]: _function(*each) for each in _ALL}
"""By their names, in NeMo Gym's form: {"type": "function", "name", "description", "parameters", "strict"}."""


def compact(name: str, arguments: Collection[str]) -> Mapping[str, Any]:
    """A tool in few tokens, for small models: no words, and of what it takes no more than `arguments`."""
    parameters = DEFINITIONS[name]["parameters"]
    properties = {key: {"type": value["type"]} for key, value in parameters["properties"].items() if key in arguments}
    return {
        "type": "function",
        "name": name,
        "description": "",
        "parameters": {"type": "object", "properties": properties, "required": parameters["required"]},
    }
