"""The Workplace Assistant: its tools and verdicts beside NeMo Gym's, and its tasks."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.data import Data, WorkplaceEnv
from slurmkit.config.load import load_config
from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Message, Score, Task, ToolCall
from slurmkit.envs.workplace.company import make_world
from slurmkit.envs.workplace.definitions import DEFINITIONS
from slurmkit.envs.workplace.desk import Desk, as_text
from slurmkit.envs.workplace.domain import Workplace
from slurmkit.envs.workplace.scoring import Call, end_state, reward
from slurmkit.envs.workplace.tasks import Goal
from slurmkit.envs.workplace.world import World
from slurmkit.errors import UserError
from tests.support.requirements import need_shared_data

VERDICTS = [json.loads(line) for line in (Path(__file__).parent / "verdicts.jsonl").read_text().splitlines()]


@cache
def gym_world() -> World:
    return World.read(need_shared_data("workplace_gym/emails.csv").parent)


def call(tool: str, /, **arguments: Any) -> Call:
    return tool, json.dumps(arguments)


def judge(world: World, predicted: Sequence[Call], gold: Sequence[Call], scoring: Any, *, looked: bool = True) -> float:
    start, ends = Desk(world).tables, [end_state(world, calls) for calls in (predicted, gold)]
    return reward(start, *ends, scoring, looked=looked)


def answer(tool: str, /, **arguments: Any) -> Any:
    return Desk(gym_world()).answer(tool, arguments)[0]


def play(domain: Workplace, task: Task, *turns: Sequence[Call]) -> tuple[list[Sequence[Message]], Score]:
    """What follows each reply, and the score."""

    async def episode() -> tuple[list[Sequence[Message]], Score]:
        environment = domain.environment()
        await environment.start(task)
        said = []
        for number, calls in enumerate(turns):
            asked = tuple(ToolCall(f"call_{number}_{i}", *each) for i, each in enumerate(calls))
            said.append(await environment.step(Message("assistant", "", tool_calls=asked)))
        return said, await environment.score()

    return asyncio.run(episode())


def gym_row(**changes: Any) -> dict[str, Any]:
    return {
        "responses_create_params": {
            "input": [{"role": "system", "content": "s"}, {"role": "user", "content": "Delete it."}],
            "tools": [DEFINITIONS["email_delete_email"]],
        },
        "ground_truth": [{"name": "email_delete_email", "arguments": '{"email_id": "00000007"}'}],
        **changes,
    }


def domain_of(path: Path, *rows: Any, **config: Any) -> Workplace:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Workplace(WorkplaceEnv(**config), Data.model_validate({"train": {"data_path": str(path)}}))


# --- beside NeMo Gym ---


def test_every_recorded_verdict_of_nemo_gym_is_ours_too() -> None:
    verdicts = [case["reward"] for case in VERDICTS]
    assert 50 < sum(verdicts) < len(verdicts) - 50
    assert [judge(gym_world(), case["predicted"], case["gold"], "gym") for case in VERDICTS] == verdicts


def test_tools_reproduce_every_recorded_nemo_gym_output_including_errors() -> None:
    tools = set()
    for case in VERDICTS:
        desk = Desk(gym_world())
        for (name, arguments), output in zip(case["predicted"], case["outputs"], strict=True):
            text = as_text(desk.answer(name, json.loads(arguments))[0])
            assert output in (text, hashlib.sha256(text.encode()).hexdigest()), (name, arguments, text)
            tools.add(name)
    assert tools >= set(DEFINITIONS)


def test_tool_names_arguments_and_required_lists_match_nemo_gym_data() -> None:
    row = json.loads(need_shared_data("workplace_gym/example.jsonl").read_text().splitlines()[0])

    def shape(tool: Any) -> Any:
        parameters = tool["parameters"]
        types = [(name, each["type"]) for name, each in parameters["properties"].items()]
        return tool["name"], types, parameters["required"]

    assert [shape(tool) for tool in DEFINITIONS.values()] == [
        shape(tool) for tool in row["responses_create_params"]["tools"]
    ]


def test_unmodified_gym_rows_earn_1_for_gold_calls_and_0_for_no_calls() -> None:
    path = need_shared_data("workplace_gym/example.jsonl")
    config = WorkplaceEnv(databases=str(path.parent))
    domain = Workplace(config, Data.model_validate({"train": {"data_path": str(path)}}))
    row = json.loads(path.read_text().splitlines()[0])
    assert len(domain.train_tasks) == 5
    for task in domain.train_tasks:
        assert play(domain, task, Goal.of(task.answer).calls, ())[1] == Score(1.0, True)
        assert play(domain, task, ())[1] == Score(0.0, False)
    opening = asyncio.run(domain.environment().start(domain.train_tasks[0]))
    assert [message.role for message in opening.messages] == ["system", "user"]
    assert [{"type": "function", **tool.definition["function"]} for tool in opening.tools] == (
        row["responses_create_params"]["tools"]
    )
    other = asyncio.run(domain.environment().start(domain.train_tasks[1]))
    assert all(one is two for one, two in zip(opening.tools, other.tools, strict=True))


def test_gold_calls_earn_1_on_all_690_workbench_tasks_under_both_scorings() -> None:
    folder = need_shared_data("workbench/emails.csv").parent
    files = sorted(folder.glob("*_queries_and_answers.csv"))
    data = Data.model_validate({"train": [{"data_path": str(file)} for file in files]})
    domain = Workplace(WorkplaceEnv(databases=str(folder)), data)
    assert len(domain.train_tasks) == 690
    golds = [Goal.of(task.answer).calls for task in domain.train_tasks]
    for scoring, by_doing_nothing in (("gym", 124), ("strict", 0)):
        assert sum(judge(domain.world, gold, gold, scoring) for gold in golds) == 690
        assert sum(judge(domain.world, (), gold, scoring, looked=False) for gold in golds) == by_doing_nothing
    # 122 tasks expect no call, and two plot nothing new: they set a task to the list that it is in.
    assert sum(not gold for gold in golds) == 122


# --- the two ways of scoring ---

SEND = call("email_send_email", recipient="nadia.moreau@atlas.com", subject="One", body="b")
OTHER = call("email_send_email", recipient="nadia.moreau@atlas.com", subject="Two", body="b")
DELETE = call("email_delete_email", email_id="00000057")
ADD = "customer_relationship_manager_add_customer"
BOOK = {"participant_email": "nadia.moreau@atlas.com", "event_start": "2023-12-01 09:00:00", "duration": "30"}


@pytest.mark.parametrize(
    ("predicted", "gold", "gym", "strict"),
    [
        pytest.param([DELETE, SEND], [SEND, DELETE], 0, 1, id="another order"),
        pytest.param([OTHER, SEND], [SEND, OTHER], 0, 1, id="two of a kind in another order"),
        pytest.param(
            [call("calendar_create_event", event_name="x", **BOOK), call("calendar_delete_event", event_id="00000098")],
            [call("calendar_delete_event", event_id="00000098"), call("calendar_create_event", event_name="x", **BOOK)],
            1,
            1,
            id="another order in the calendar where each new row has the label 0",
        ),
        pytest.param([SEND, SEND], [SEND], 0, 0, id="twice in place of once"),
        pytest.param([DELETE], [SEND, DELETE], 0, 0, id="half of it"),
        pytest.param([call("no_such_tool"), SEND], [SEND], 1, 1, id="an error on the way"),
        pytest.param(
            [call("email_send_email", recipient="NADIA.moreau@atlas.com", subject="ONE", body="B")],
            [SEND],
            1,
            1,
            id="another case",
        ),
        pytest.param(
            [call(ADD, customer_name="A", assigned_to_email="b", status="lead")],
            [call(ADD, customer_name="A", assigned_to_email="b", status="Lead")],
            0,
            0,
            id="another case where it matters",
        ),
        pytest.param(
            [call("calendar_create_event", event_name=7, **BOOK)],
            [call("calendar_create_event", event_name=["x"], **BOOK)],
            1,
            0,
            id="what is no text equals what else is none",
        ),
        pytest.param(
            [call("calendar_create_event", event_name="x", **BOOK), call("calendar_delete_event", event_id="00000300")],
            [DELETE, SEND],
            0,
            0,
            id="something else",
        ),
    ],
)  # fmt: skip
def test_end_states_are_compared_as_documented(
    predicted: list[Call], gold: list[Call], gym: float, strict: float
) -> None:
    assert [judge(gym_world(), predicted, gold, scoring) for scoring in ("gym", "strict")] == [gym, strict]


def test_without_changes_to_make_strict_requires_a_lookup_and_gym_does_not(tmp_path: Path) -> None:
    row = gym_row(ground_truth=[])
    rewards = {}
    for scoring in ("gym", "strict"):
        domain = domain_of(tmp_path / "rows.jsonl", row, scoring=scoring)
        task, look = domain.train_tasks[0], call("email_search_emails", query="greta")
        turns = ([()], [[look], ()], [[call("email_search_emails", page_size="x")]], [[look], [SEND]])
        rewards[scoring] = [play(domain, task, *each)[1].reward for each in turns]
    assert rewards == {"gym": [1, 1, 1, 0], "strict": [0, 1, 0, 0]}


# --- episodes ---


def test_an_episode_sees_its_own_changes_and_no_other_one_s(tmp_path: Path) -> None:
    domain = domain_of(tmp_path / "rows.jsonl", gym_row())
    task = domain.train_tasks[0]
    read = call("email_get_email_information_by_id", email_id="00000007", field="subject")
    (first, second), score = play(domain, task, [read, *Goal.of(task.answer).calls], [read])
    assert [json.loads(message.content)["output"] for message in second] == ["Email not found."]
    assert first[1] == Message(
        "tool", '{"output":"Email deleted successfully."}', tool_call_id="call_0_1", name="email_delete_email"
    )
    assert score.reward == 1
    again, score = play(domain, task, [read])
    assert again[0][0].content == first[0].content
    assert score.reward == 0


def test_an_episode_is_over_after_max_turns_and_the_last_calls_count(tmp_path: Path) -> None:
    domain = domain_of(tmp_path / "rows.jsonl", gym_row(), max_turns=2)
    task = domain.train_tasks[0]
    said, score = play(domain, task, [call("email_search_emails")], Goal.of(task.answer).calls)
    assert [len(each) for each in said] == [1, 0]
    assert score.reward == 1


@pytest.mark.parametrize("arguments", ["{oops", "[1]", "[" * 100_000, "7"])
def test_arguments_that_are_no_object_are_answered_and_skipped(tmp_path: Path, arguments: str) -> None:
    domain = domain_of(tmp_path / "rows.jsonl", gym_row())
    task = domain.train_tasks[0]
    said, score = play(domain, task, [("email_delete_email", arguments)], Goal.of(task.answer).calls)
    assert json.loads(said[0][0].content)["error"].startswith("Invalid tool call arguments: ")
    assert score.reward == 1


def test_a_pattern_that_would_search_for_ever_is_answered_in_time() -> None:
    found = answer("project_management_search_tasks", task_name="([a-z ]|[a-z])+[^a-z ]")
    assert found == "Error executing tool 'project_management_search_tasks': regex timed out"


def test_an_average_turns_text_into_numbers_in_its_own_episode_only() -> None:
    desk = Desk(gym_world())
    looks = []
    for tool in ("engaged_users_count", "get_average_session_duration"):
        desk.answer(f"analytics_{tool}", {})
        looks.append(desk.answer("analytics_get_visitor_information_by_id", {"visitor_id": "0860"})[0])
    assert [visits[0]["session_duration_seconds"] for visits in looks] == ["4", 4.0]
    assert answer("analytics_get_visitor_information_by_id", visitor_id="0860") == looks[0]


def test_replies_and_forwards_get_the_next_ids_and_subject_prefixes() -> None:
    desk = Desk(gym_world())
    desk.answer("email_reply_email", {"email_id": "00000057", "body": "b"})
    desk.answer("email_forward_email", {"email_id": "500", "recipient": "Nadia.Moreau@atlas.com"})
    subject = desk.answer("email_get_email_information_by_id", {"email_id": "00000057", "field": "subject"})[0][
        "subject"
    ]
    found = desk.answer("email_search_emails", {"date_min": "2023-11-30", "query": "fw: re:"})[0]["emails"]
    assert [(email["email_id"], email["subject"], email["sender/recipient"]) for email in found] == [
        ("501", f"FW: RE: {subject}", "nadia.moreau@atlas.com")
    ]


def test_a_customer_without_an_email_breaks_the_email_search_like_pandas() -> None:
    desk = Desk(gym_world())
    tool, wanted = "customer_relationship_manager_search_customers", {"customer_email": "nano", "page_size": 1}
    assert desk.answer(tool, wanted)[0]["pagination"]["total_customers"] > 0
    desk.answer(ADD, {"customer_name": "A", "assigned_to_email": "b", "status": "Lead"})
    reason = "Cannot mask with non-boolean array containing NA / NaN values"
    assert desk.answer(tool, wanted) == (f"Error executing tool '{tool}': {reason}", False)


# --- what is read ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses_create_params": {"input": []}}, r"rows\.jsonl:2: there is no prompt: responses_create_params"),
        ({"responses_create_params": {}}, r"rows\.jsonl:2: there is no prompt"),
        (
            {"responses_create_params": {"input": [{"role": "assistant", "content": "hi"}]}},
            r"rows\.jsonl:2: there is no prompt: the last message .* is the assistant's",
        ),
        ({"responses_create_params": {"input": [{"role": "user"}]}}, r"input\.0 must have a role .*content"),
        ({"responses_create_params": {"input": "a", "tools": ["x"]}}, r"rows\.jsonl:2: .*tools\.0 is no tool"),
        ({"responses_create_params": {"input": "a", "tools": "[{"}}, r"rows\.jsonl:2: .*tools is no JSON"),
        ({"responses_create_params": "{"}, r"rows\.jsonl:2: responses_create_params is no JSON"),
        ({"responses_create_params": {"input": "\ud83d"}}, r"rows\.jsonl:2: the key 'responses_create_params\.input' "),
        ({"responses_create_params": '{"input": "\\ude00"}'}, r"rows\.jsonl:2: .* half of a surrogate pair"),
        (
            {"responses_create_params": {"input": "a", "tools": '["\\ud83d"]'}},
            r"rows\.jsonl:2: the key 'responses_create_params\.tools\.0' ",
        ),
        (
            {"ground_truth": [{"name": "email_delete_email", "arguments": '{"email_id": "\\ud83d"}'}]},
            r"rows\.jsonl:2: the key 'email_delete_email\.email_id' ",
        ),
        ({"ground_truth": None}, r"rows\.jsonl:2: ground_truth must be a list, found NoneType"),
        ({"ground_truth": [{"name": "x", "arguments": "{}"}]}, r"rows\.jsonl:2: .* a tool that there is not: x"),
        ({"ground_truth": [{"name": "email_delete_email", "arguments": {}}]}, r"0\.arguments must be a JSON object"),
        (
            {"ground_truth": [{"name": "email_delete_email", "arguments": '{"email_id": 7}'}]},
            r"rows\.jsonl:2: email_delete_email: email_id must be of type string, found 7",
        ),
        ({"ground_truth": [{"name": "email_delete_email", "arguments": "{}"}]}, r"email_delete_email needs email_id"),
        (
            {"ground_truth": [{"name": "email_delete_email", "arguments": '{"id": "7"}'}]},
            r"email_delete_email takes no id \(it takes email_id\)",
        ),
        (
            {"ground_truth": [{"name": "email_delete_email", "arguments": '{"email_id": "7"}'}]},
            r"rows\.jsonl:2: an expected call fails: .*Email not found",
        ),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        domain_of(tmp_path / "rows.jsonl", gym_row(), gym_row(**changes))


def test_bad_rows_are_listed_up_to_five_then_counted_and_can_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [gym_row(), *[gym_row(ground_truth=7)] * 8]
    with pytest.raises(UserError) as caught:
        domain_of(tmp_path / "rows.jsonl", *rows)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[-1].endswith("rows.jsonl: 3 more bad rows")
    assert len(domain_of(tmp_path / "rows.jsonl", *rows, skip_bad_rows=True).train_tasks) == 1
    assert capsys.readouterr().err.count("left out: ") == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,answer\n,[]\n", r"tasks\.csv:2: there is no prompt: the column 'query'"),
        ('query,answer\ndo,"[\'email.delete_email(7)\']"\n', r"tasks\.csv:2: the column 'answer' must be a list"),
        ('query,answer\ndo,"[\'email.nothing.func()\']"\n', r"tasks\.csv:2: .* that there is not: email_nothing"),
        (
            'query,answer\ndo,"[\'email.delete_email.func(email_id=""\\\\ud83d"")\']"\n',
            r"tasks\.csv:2: the key 'email_delete_email\.email_id' holds half",
        ),
        ("query,answer\ndo,oops(\n", r"tasks\.csv:2: the column 'answer'"),
        ("query,answer\n", r"tasks\.csv: holds no task"),
    ],
)  # fmt: skip
def test_a_task_of_workbench_s_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tasks.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Workplace(WorkplaceEnv(), Data.model_validate({"train": {"data_path": str(path)}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "emails.csv").unlink(), r"databases: .*emails\.csv cannot be read: No such file"),
        (lambda folder: (folder / "emails.csv").write_text("a,b\n"), r"emails\.csv must have the columns email_id, .*"),
        (lambda folder: (folder / "emails.csv").open("a").write("1,2\n"), r"emails\.csv:\d+: 2 fields, not 6"),
    ],
)
def test_a_database_that_cannot_be_used_is_named(tmp_path: Path, change: Any, message: str) -> None:
    make_world(0).write(tmp_path / "databases")
    change(tmp_path / "databases")
    with pytest.raises(UserError, match=message):
        World.read(tmp_path / "databases")


def test_a_byte_order_mark_is_no_part_of_a_csv_file(tmp_path: Path) -> None:
    make_world(0).write(tmp_path / "databases")
    tasks = tmp_path / "tasks.csv"
    tasks.write_text("query,answer\nlook,[]\n")
    for path in (*(tmp_path / "databases").iterdir(), tasks):
        path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert World.read(tmp_path / "databases").addresses == make_world(0).addresses
    found = Workplace(WorkplaceEnv(), Data.model_validate({"train": {"data_path": str(tasks)}}))
    assert [task.question for task in found.train_tasks] == ["look"]


def test_a_made_up_company_reads_back_as_it_was_written(tmp_path: Path) -> None:
    world = make_world(3)
    world.write(tmp_path)
    back = World.read(tmp_path)
    assert back.addresses == world.addresses
    for name, table in world.tables.items():
        assert repr(back.tables[name].records()) == repr(table.records())
    assert repr(make_world(4).tables["emails"].records()) != repr(world.tables["emails"].records())
    shutil.rmtree(tmp_path)


def test_a_workplace_configuration_requires_a_data_path_for_its_tasks(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("env: {name: workplace}\npolicy: {model_name: some/model}\n")
    with pytest.raises(UserError, match=r"env\.name workplace reads its tasks: data\.train\.data_path must name"):
        load_config(path)
    domain_of(tmp_path / "rows.jsonl", gym_row())
    sources = [f"data.{name}.data_path={tmp_path / 'rows.jsonl'}" for name in ("train", "validation")]
    domain = make_domain(load_config(path, sources))
    assert isinstance(domain, Workplace)
    assert [len(domain.train_tasks), len(domain.validation_tasks)] == [1, 1]


def test_rows_with_other_tools_share_those_that_are_alike(tmp_path: Path) -> None:
    few = gym_row()
    many = gym_row()
    many["responses_create_params"]["tools"] = [DEFINITIONS["email_search_emails"], DEFINITIONS["email_delete_email"]]
    domain = domain_of(tmp_path / "rows.jsonl", few, many)
    one, two = (asyncio.run(domain.environment().start(task)).tools for task in domain.train_tasks)
    assert [tool.name for tool in two] == ["email_search_emails", "email_delete_email"]
    assert one == two[1:]  # tools are equal to themselves alone
