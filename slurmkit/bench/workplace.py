"""The Workplace Assistant alone: episodes a second in one process, and its memory over very many of them."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from slurmkit.bench.child import answer
from slurmkit.config.data import Data, WorkplaceEnv
from slurmkit.envs.environment import Message, Task, ToolCall
from slurmkit.envs.workplace.company import make_world
from slurmkit.envs.workplace.domain import Workplace
from slurmkit.envs.workplace.families import FAMILIES, call
from slurmkit.envs.workplace.generate import drafts, row
from slurmkit.envs.workplace.scoring import Call

_LOOKS = (
    call("email_search_emails", query="roadmap"),
    call("calendar_search_events", query="review", time_min="2023-11-01 00:00:00"),
    call("customer_relationship_manager_search_customers", status="Lead"),
    call("project_management_search_tasks", list_name="Backlog"),
    call("analytics_engaged_users_count", time_min="2023-10-01"),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the measurement."""

    episodes: int = 100_000
    tasks: int = 280
    seed: int = 0


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Episodes of 3 to 6 calls, each a reply of its own: the task's calls and some that only look."""
    settings = Settings(**given)
    random = Random(f"bench {settings.seed}")
    found = list(islice(drafts(make_world(0), list(FAMILIES), settings.seed), settings.tasks))
    rows = [row(number, *each, few=False) for number, each in enumerate(found)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        domain = Workplace(WorkplaceEnv(), Data.model_validate({"train": {"data_path": str(path)}}))
    scripts = [_script(draft.calls, random) for _, draft in found]
    mean_calls = sum(map(len, scripts)) / len(scripts)
    replies = [_replies(script) for script in scripts]

    async def play(count: int) -> float:
        earned = 0.0
        for number in range(count):
            index = number % len(replies)
            earned += await _episode(domain, domain.train_tasks[index], replies[index])
        return earned

    asyncio.run(play(len(replies)))  # what is worked out once is not measured
    part, memory, seconds, rewards = max(1, settings.episodes // 10), [_resident_mib()], [], 0.0
    for _ in range(10):
        started = time.perf_counter()
        rewards += asyncio.run(play(part))
        seconds.append(time.perf_counter() - started)
        memory.append(_resident_mib())
    return {
        "settings": asdict(settings),
        "figures": {
            "episodes_per_second": 10 * part / sum(seconds),
            "slowest_episodes_per_second": part / max(seconds),
            "calls_per_episode": mean_calls,
            "episodes": 10 * part,
            "reward_mean": rewards / (10 * part),
            "memory_mib": memory,
            "memory_growth_mib": memory[-1] - memory[0],
        },
    }


def _script(calls: Sequence[Call], random: Random) -> list[Call]:
    looks = [random.choice(_LOOKS) for _ in range(max(0, random.randint(3, 6) - len(calls)))]
    return [*looks, *calls][:6]


def _replies(script: Sequence[Call]) -> list[Message]:
    return [Message("assistant", "", tool_calls=(ToolCall(f"call_{i}", *each),)) for i, each in enumerate(script)]


async def _episode(domain: Workplace, task: Task, replies: Sequence[Message]) -> float:
    environment = domain.environment()
    await environment.start(task)
    for reply in replies:
        await environment.step(reply)
    return (await environment.score()).reward


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    answer(measure)
