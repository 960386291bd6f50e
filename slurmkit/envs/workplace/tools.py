"""The tools of the company directory, of email and of the calendar.

Classes, methods and arguments have NeMo Gym's names, as Python puts them into the errors that a model sees. Every
argument has a default, so that a missing one is the tool's to answer for.
"""

from __future__ import annotations

from typing import Any

from slurmkit.envs.workplace.table import Table
from slurmkit.envs.workplace.values import NOW, Refused, contains, day, timestamp

_SEARCHED = ("subject", "body", "sender/recipient")
_EVENT_FIELDS = ("event_id", "event_name", "participant_email", "event_start", "duration")


def page_of(kind: str, records: list[dict[str, Any]], page: Any, page_size: Any) -> dict[str, Any]:
    """Part of what a search found. Python's own errors where `page` and `page_size` are no numbers."""
    total = len(records)
    total_pages = (total + page_size - 1) // page_size
    page = max(1, min(page, total_pages)) if total_pages > 0 else 1
    start = (page - 1) * page_size
    numbers = {f"total_{kind}": total, "page": page, "page_size": page_size, "total_pages": total_pages}
    return {kind: records[start : min(start + page_size, total)], "pagination": numbers}


class CompanyDirectoryTool:
    """The addresses of all employees."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._addresses = addresses

    def find_email_address(self, name: Any = "") -> Any:
        if name == "":
            return Refused("Name not provided.")
        found = contains(name.lower())
        return [address for address in self._addresses if found(address)]


class EmailTool:
    """Sam's inbox and outbox."""

    def __init__(self, emails: Table) -> None:
        self.table = emails

    def get_email_information_by_id(self, email_id: Any = None, field: Any = None) -> Any:
        if not email_id:
            return Refused("Email ID not provided.")
        if not field:
            return Refused("Field not provided.")
        try:
            found = self.table.where("email_id", email_id)
            if not found:
                return Refused("Email not found.")
            if field in found[0]:
                return {field: found[0][field]}
            return Refused(f"Field '{field}' not found. Available fields: {', '.join(found[0])}")
        except Exception as error:
            return Refused(f"Error retrieving email information: {error}")

    def search_emails(
        self, query: Any = "", date_min: Any = None, date_max: Any = None, page: Any = 1, page_size: Any = 5
    ) -> Any:
        try:
            words = query.lower().split()
            rows = [row for row in self.table.rows if all(word in row.lower(_SEARCHED) for word in words)]
            emails = [row.values for row in rows]
            emails.sort(key=lambda email: timestamp(email["sent_datetime"]), reverse=True)
            if date_min:
                emails = [email for email in emails if day(email["sent_datetime"]) >= day(date_min)]
            if date_max:
                emails = [email for email in emails if day(email["sent_datetime"]) <= day(date_max)]
            found = page_of("emails", emails, page, page_size)
            return found if emails else "No emails found."
        except Exception as error:
            return Refused(f"Error searching emails: {error}")

    def send_email(self, recipient: Any = None, subject: Any = None, body: Any = None) -> Any:
        if not recipient or not subject or not body:
            return Refused("Recipient, subject, or body not provided.")
        if "@" not in recipient or "." not in recipient:
            return Refused("Invalid recipient email address.")
        try:
            email = {
                "email_id": str(self.table.next_id("email_id")) if self.table.rows else "1",
                "inbox/outbox": "outbox",
                "sender/recipient": recipient.lower(),
                "subject": subject,
                "sent_datetime": str(NOW),
                "body": body,
            }
            self.table = self.table.extended(email, renumber=True)
            return "Email sent successfully."
        except Exception as error:
            return Refused(f"Error sending email: {error}")

    def delete_email(self, email_id: Any = None) -> Any:
        if not email_id:
            return Refused("Email ID not provided.")
        try:
            if not self.table.holds("email_id", email_id):
                return Refused("Email not found.")
            self.table = self.table.without("email_id", email_id)
            return "Email deleted successfully."
        except Exception as error:
            return Refused(f"Error deleting email: {error}")

    def forward_email(self, email_id: Any = None, recipient: Any = None) -> Any:
        if not email_id or not recipient:
            return Refused("Email ID or recipient not provided.")
        if "@" not in recipient or "." not in recipient:
            return Refused("Invalid recipient email address.")
        try:
            if not self.table.holds("email_id", email_id):
                return Refused("Email not found.")
            recipient = recipient.lower()
            email = self.table.where("email_id", email_id)[0]
            result = self.send_email(recipient, f"FW: {email['subject']}", email["body"])
            return result if "Error" in result or "Invalid" in result else "Email forwarded successfully."
        except Exception as error:
            return Refused(f"Error forwarding email: {error}")

    def reply_email(self, email_id: Any = None, body: Any = None) -> Any:
        if not email_id or not body:
            return Refused("Email ID or body not provided.")
        try:
            if not self.table.holds("email_id", email_id):
                return Refused("Email not found.")
            email = self.table.where("email_id", email_id)[0]
            result = self.send_email(email["sender/recipient"], f"RE: {email['subject']}", body)
            return result if "Error" in result or "Invalid" in result else "Email replied successfully."
        except Exception as error:
            return Refused(f"Error replying to email: {error}")


class CalendarTool:
    """Sam's meetings."""

    def __init__(self, events: Table) -> None:
        self.table = events

    def get_event_information_by_id(self, event_id: Any = None, field: Any = None) -> Any:
        if not event_id:
            return Refused("Event ID not provided.")
        if not field:
            return Refused("Field not provided.")
        if not _is_event_id(event_id):
            return Refused("Invalid event ID format. Expected 8-digit ID.")
        if field not in _EVENT_FIELDS:
            return Refused(f"Invalid field. Available fields are: {', '.join(_EVENT_FIELDS)}")
        found = self.table.where("event_id", event_id)
        return {field: found[0][field]} if found else Refused("Event not found.")

    def search_events(
        self, query: Any = "", time_min: Any = None, time_max: Any = None, page: Any = 1, page_size: Any = 5
    ) -> Any:
        if time_min:
            try:
                time_min = timestamp(time_min)
            except ValueError:
                return Refused("Invalid time_min format. Expected YYYY-MM-DD HH:MM:SS.")
        if time_max:
            try:
                time_max = timestamp(time_max)
            except ValueError:
                return Refused("Invalid time_max format. Expected YYYY-MM-DD HH:MM:SS.")
        found = contains(query)
        events = [
            event for event in self.table.records() if found(event["event_name"]) or found(event["participant_email"])
        ]
        if time_min:
            events = [event for event in events if _before(time_min, timestamp(event["event_start"]))]
        if time_max:
            events = [event for event in events if _before(timestamp(event["event_start"]), time_max)]
        if not events:
            return "No events found."
        events.sort(key=lambda event: timestamp(event["event_start"]), reverse=True)
        return page_of("events", events, page, page_size)

    def create_event(
        self, event_name: Any = None, participant_email: Any = None, event_start: Any = None, duration: Any = None
    ) -> Any:
        if not event_name:
            return Refused("Event name not provided.")
        if not participant_email:
            return Refused("Participant email not provided.")
        if not event_start:
            return Refused("Event start not provided.")
        if not duration:
            return Refused("Event duration not provided.")
        wrong = _wrong_start(event_start) or _wrong_duration(duration)
        if wrong:
            return wrong
        event = {
            "participant_email": participant_email.lower(),
            "event_id": str(self.table.next_id("event_id")).zfill(8),
            "event_name": event_name,
            "event_start": event_start,
            "duration": duration,
        }
        self.table = self.table.extended(event, renumber=False)
        return event["event_id"]

    def delete_event(self, event_id: Any = None) -> Any:
        if not event_id:
            return Refused("Event ID not provided.")
        if not _is_event_id(event_id):
            return Refused("Invalid event ID format. Expected 8-digit ID.")
        if not self.table.holds("event_id", event_id):
            return Refused("Event not found.")
        self.table = self.table.without("event_id", event_id)
        return "Event deleted successfully."

    def update_event(self, event_id: Any = None, field: Any = None, new_value: Any = None) -> Any:
        if not event_id or not field or not new_value:
            return Refused("Event ID, field, or new value not provided.")
        if not _is_event_id(event_id):
            return Refused("Invalid event ID format. Expected 8-digit ID.")
        if field not in _EVENT_FIELDS[1:]:
            return Refused(f"Invalid field. Available fields are: {', '.join(_EVENT_FIELDS[1:])}")
        wrong = _wrong_start(new_value) if field == "event_start" else None
        wrong = _wrong_duration(new_value) if field == "duration" else wrong
        if wrong:
            return wrong
        if not self.table.holds("event_id", event_id):
            return Refused("Event not found.")
        if field == "participant_email":
            new_value = new_value.lower()
        self.table = self.table.updated("event_id", event_id, field, new_value)
        return "Event updated successfully."


def _is_event_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 8 and value.isdigit()


def _before(first: Any, second: Any) -> bool:
    if (first.tzinfo is None) != (second.tzinfo is None):
        raise TypeError("Cannot compare tz-naive and tz-aware timestamps")
    return bool(first <= second)


def _wrong_start(value: Any) -> Refused | None:
    try:
        timestamp(value)
    except ValueError:
        return Refused("Invalid event_start format. Expected YYYY-MM-DD HH:MM:SS.")
    return None


def _wrong_duration(value: Any) -> Refused | None:
    try:
        return Refused("Duration must be a positive number of minutes.") if int(value) <= 0 else None
    except ValueError:
        return Refused("Invalid duration format. Expected a number of minutes.")
