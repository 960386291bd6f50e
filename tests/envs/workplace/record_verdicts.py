"""How verdicts.jsonl was made: random calls, what NeMo Gym's own tools answer, and what its own is_correct says.

    python -m venv v && v/bin/pip install pandas==2.3.2          # what NeMo Gym pins
    git clone https://github.com/NVIDIA-NeMo/Gym                 # made with commit 07d6b0d07
    v/bin/python record_verdicts.py Gym > verdicts.jsonl

It imports nothing of slurmkit. One line a case: {"gold", "predicted": lists of [name, arguments], "outputs": what a
server answers to each predicted call (long ones by their SHA-256), "reward": the verdict}.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import warnings
from pathlib import Path
from random import Random

CASES, SEED = 300, 7
WRITES = ("send", "delete", "forward", "reply", "create", "update", "add")
FREE = ("subject", "body", "event_name", "task_name", "customer_name", "notes")
ODD = [57, 0, True, False, 2.5, None, ["a"], [], {"a": 1}, ["00000057", "b"]]
LISTS = ["Backlog", "In Progress", "In Review", "Completed", "backlog"]
BOARDS = ["Back end", "Front end", "Design", "front end"]
STATUSES = ["Qualified", "Won", "Lost", "Lead", "Proposal", "won"]
PRODUCTS = ["Software", "Hardware", "Services", "Consulting", "Training", "software"]


class Random27(Random):
    """Arguments for all 27 tools, that meet each other's ids again and again, right and wrong."""

    def some(self, *values):
        return self.choice(values)

    def maybe(self, **values):
        return {key: value for key, value in values.items() if self.random() < 0.5}

    def day(self):
        return f"2023-{self.some('09', '10', '11', '12')}-{self.randint(1, 30):02}"

    def time(self):
        return f"{self.day()} {self.randint(8, 18):02}:{self.some('00', '30')}:00"

    def text(self):
        return self.some(
            "Hello", "hello", "Update", "RE: plan", "Sprint (review", "a|b", "sync", "Task Update", "hm", ""
        )

    def name(self):
        return self.some("aisha", "carlos", "nadia", "raj", "kofi", "a", ".")

    def address(self):
        return self.some("raj.patel@atlas.com", "nadia.moreau@atlas.com", "RAJ.patel@atlas.com", "x", "b@y.com", "a.b")

    def page(self):
        return self.some({}, {"page": self.some(1, 2, 3, 0, -1, 100)}, {"page_size": self.some(1, 2, 5, 50)})

    def email(self):
        return self.some("00000373", "00000353", "00000013", "500", "501", "57")

    def event(self):
        return self.some("00000013", "00000275", "00000098", "00000300", "00000301", "3")

    def task(self):
        return self.some("00000149", "00000037", "00000061", "00000300", "1")

    def customer(self):
        return self.some("00000189", "00000107", "00000052", "00000200", "1")

    def span(self):
        return self.maybe(time_min=self.day(), time_max=self.day())

    def arguments(self, name):
        kit, _, tool = name.partition(".")
        return getattr(self, f"_{kit}")(tool)

    def _company_directory(self, tool):
        return self.maybe(name=self.name())

    def _email(self, tool):
        one = {"email_id": self.email()}
        return {
            "get_email_information_by_id": {**one, "field": self.some("subject", "body", "sender", "email_id")},
            "search_emails": {
                **self.maybe(query=self.some(self.name(), "task update", "Sam hi", "zzzz")),
                **self.maybe(date_min=self.day(), date_max=self.some(self.day(), "soon")),
                **self.page(),
            },
            "send_email": {"recipient": self.address(), "subject": self.text(), "body": self.text()},
            "delete_email": one,
            "forward_email": {**one, "recipient": self.address()},
            "reply_email": {**one, "body": self.text()},
        }[tool]

    def _calendar(self, tool):
        one = {"event_id": self.event()}
        start = self.some(self.time(), self.time(), "Dec 1 2023 9am", "whenever", "45", self.day())
        field = self.some("event_name", "participant_email", "event_start", "duration", "event_id")
        return {
            "get_event_information_by_id": {**one, "field": self.some("event_name", "duration", "x")},
            "search_events": {
                **self.maybe(query=self.some(self.name(), "sync", "(", "review", "^a", "a+b*")),
                **self.maybe(time_min=self.some(self.time(), "2023-13-01", "soon"), time_max=self.time()),
                **self.page(),
            },
            "create_event": {
                "event_name": self.text(),
                "participant_email": self.address(),
                "event_start": start,
                "duration": self.some("30", "60", "0", "-5", "x", "30"),
            },
            "delete_event": one,
            "update_event": {**one, "field": field, "new_value": self.some(self.text(), self.address(), start, "45")},
        }[tool]

    def _analytics(self, tool):
        return {
            "get_visitor_information_by_id": {"visitor_id": self.some("0860", "4426", "1685", "1")},
            "create_plot": {
                "time_min": self.some(self.day(), "2023-11-01"),
                "time_max": "2023-11-29",
                "value_to_plot": self.some("total_visits", "user_engaged", "visits", "visits_direct"),
                "plot_type": self.some("bar", "line", "Bar", "histogram"),
            },
            "traffic_source_count": {
                **self.span(),
                **self.maybe(traffic_source=self.some("direct", "referral", "x")),
            },
        }.get(tool) or self.span()

    def _project_management(self, tool):
        one = {"task_id": self.task()}
        fields = ("task_name", "assigned_to_email", "list_name", "due_date", "board")
        task = (self.text(), self.address(), self.some(*LISTS), self.day(), self.some(*BOARDS))
        searched = (self.some("Add", "fix", "[", "update"), self.address(), self.some(*LISTS), "2023-11", "end")
        return {
            "get_task_information_by_id": {**one, "field": self.some("task_name", "board", "x")},
            "search_tasks": self.maybe(**dict(zip(fields, searched, strict=True))),
            "create_task": dict(zip(fields, task, strict=True)),
            "delete_task": one,
            "update_task": {
                **one,
                "field": self.some(*fields, "task_id", "zz"),
                "new_value": self.some(*task, "00000149"),
            },
        }[tool]

    def _customer_relationship_manager(self, tool):
        one = {"customer_id": self.customer()}
        fields = ("customer_name", "assigned_to_email", "customer_email", "status", "notes", "product_interest")
        values = (self.text(), self.address(), self.some(*STATUSES), self.some(*PRODUCTS), self.day())
        return {
            "search_customers": {
                **self.maybe(customer_name=self.some("a", "Taylor", "zz"), customer_email="nano"),
                **self.maybe(product_interest=self.some(*PRODUCTS), status=self.some(*STATUSES)),
                **self.maybe(assigned_to_email=self.address(), last_contact_date_min=self.day()),
                **self.maybe(follow_up_by_max=self.day()),
                **self.page(),
            },
            "update_customer": {
                **one,
                "field": self.some(*fields, "customer_id", "zz"),
                "new_value": self.some(*values),
            },
            "add_customer": {
                "customer_name": self.text(),
                "assigned_to_email": self.address(),
                "status": self.some(*STATUSES),
                **self.maybe(customer_email=self.address(), customer_phone="555", notes=self.some("hm", None)),
                **self.maybe(product_interest=self.some(*PRODUCTS), last_contact_date=self.day()),
            },
            "delete_customer": one,
        }[tool]

    def call(self, names, *, odd):
        writes = [name for name in names if any(f"{verb}_" in name.split(".")[1] for verb in WRITES)]
        name = self.choice(writes if self.random() < 0.8 else names)
        arguments, name = self.arguments(name), name.replace(".", "_")
        if odd and self.random() < 0.35:
            kind = self.random()
            if kind < 0.15:
                name = self.some("nope", f"{name}s", "email_", "email_table", "Email_send_email")
            elif kind < 0.3:
                arguments[self.some("extra", "self", "id")] = "x"
            elif kind < 0.45 and arguments:
                arguments.pop(self.choice(list(arguments)))
            elif arguments:
                arguments[self.choice(list(arguments))] = self.choice(ODD)
        return [name, json.dumps(arguments)]

    def other_case(self, call):
        return [
            call[0],
            json.dumps(
                {
                    key: value.swapcase() if isinstance(value, str) and key in FREE else value
                    for key, value in json.loads(call[1]).items()
                }
            ),
        ]

    def case(self, names, *, odd):
        gold = [self.call(names, odd=odd) for _ in range(self.randint(1, 5))]
        predicted, kind = list(gold), self.random()
        if kind < 0.25:
            self.shuffle(predicted)
        elif kind < 0.35:
            predicted = [self.other_case(call) for call in predicted]
        elif kind < 0.5:
            predicted.insert(self.randint(0, len(predicted)), self.call(names, odd=odd))
        elif kind < 0.6 and predicted:
            predicted.pop(self.randrange(len(predicted)))
        elif kind < 0.8:
            predicted = [self.call(names, odd=odd) for _ in range(self.randint(0, 4))]
        return {"gold": gold, "predicted": predicted}


def plain(value):
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if value != value else value


def main(gym: Path) -> None:
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(gym))
    from resources_servers.workplace_assistant.utils import get_tools, is_correct

    kits = ["email", "calendar", "analytics", "project_management", "customer_relationship_manager"]
    containers = get_tools(kits)["containers"]
    names = [
        f"{kit}.{method}"
        for kit, tool in containers.items()
        for method in vars(type(tool))
        if not method.startswith("_") and method != "reset_state"
    ]
    random = Random27(SEED)
    for number in range(CASES):
        case = random.case(names, odd=number % 2 == 1)
        functions, outputs = get_tools(kits)["functions"], []
        for name, arguments in case["predicted"]:
            try:
                given = {key: value for key, value in json.loads(arguments).items() if value is not None}
                found = functions[name](**given)
            except Exception as error:
                found = f"Error executing tool '{name}': {error}"
            text = json.dumps({"output": plain(found)}, ensure_ascii=False, separators=(",", ":"))
            outputs.append(text if len(text) <= 160 else hashlib.sha256(text.encode()).hexdigest())
        with contextlib.redirect_stdout(io.StringIO()):
            both = [[{"name": n, "arguments": a} for n, a in case[side]] for side in ("predicted", "gold")]
            reward = is_correct(*both, None)
        print(json.dumps({**case, "outputs": outputs, "reward": float(reward)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
