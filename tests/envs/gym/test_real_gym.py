"""NeMo Gym itself, from PyPI, in a Python of its own."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurmkit.envs.domains import make_domain
from slurmkit.envs.environment import Message, Score, ToolCall
from tests.envs.gym.test_resources import configured, play
from tests.support.requirements import REPOSITORY, need_shared_data

_HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL below which they are. Skips where scripts/test had no Python 3.13 to install nemo-gym for."""
    python = Path(os.environ.get("NEMO_GYM_PYTHON", REPOSITORY / ".venv-gym" / "bin" / "python"))
    if not python.exists():
        pytest.skip("no Python 3.13")  # under CI, too: Debian 12 has none
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, _HERE / "real_gym.py", str(port), "workplace_assistant", "example_session_state_mgmt"]
    # Its folder is where it would look for a configuration and leave files.
    with subprocess.Popen(command, cwd=tmp_path_factory.mktemp("gym")) as process:
        yield f"http://127.0.0.1:{port}"
        process.kill()


def test_the_real_gym_workplace_gives_gold_calls_1_and_no_calls_0(real: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in need_shared_data("workplace_gym/example.jsonl").read_text().splitlines()]
    gym = make_domain(configured(tmp_path, rows, seconds=60, url=f"{real}/workplace_assistant"))
    wrong = Message("assistant", "", (ToolCall("call_w", "email_reply_email", '{"nope": 3}'),))
    for task in gym.train_tasks:
        calls = [
            ToolCall(f"call_{number}", each["name"], each["arguments"])
            for number, each in enumerate(json.loads(task.answer)["ground_truth"])
        ]
        gold = Message("assistant", "<think>\nHm.\n</think>\n\nI do.", tuple(calls))
        said, score = asyncio.run(play(gym.environment(), task, wrong, gold, Message("assistant", "Done.")))
        assert score == Score(1.0, True)
        assert "unexpected keyword argument 'nope'" in said[0]
        assert len(said) == 1 + len(calls)
        assert asyncio.run(play(gym.environment(), task, Message("assistant", "No.")))[1] == Score(0.0, False)


def test_a_session_of_nemo_gym_is_known_by_its_signed_cookie(real: str, tmp_path: Path) -> None:
    tool = {"type": "function", "name": "increment_counter", "description": "", "parameters": {"type": "object"}}
    tool["strict"] = False
    params = {"input": "Count.", "tools": [tool]}
    rows = [{"responses_create_params": params, "initial_count": 3, "expected_count": 5}]
    (task,) = (gym := make_domain(configured(tmp_path, rows, url=f"{real}/example_session_state_mgmt"))).train_tasks
    reply = Message("assistant", "", (ToolCall("call_0", "increment_counter", '{"count": 2}'),))
    wrong = Message("assistant", "", (ToolCall("call_0", "increment_counter", '{"count": "two"}'),))

    async def both() -> list[tuple[list[str], Score]]:
        return await asyncio.gather(*(play(gym.environment(), task, each) for each in (reply, wrong)))

    right, refused = asyncio.run(both())
    assert right == (['{"success":true}'], Score(1.0, True))
    assert refused[1] == Score(0.0, False)
    assert "int_parsing" in refused[0][0], "a body that it does not take is told to the model"
