"""The Workplace Assistant as a domain: one world for all episodes, and a desk for each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from slurmkit.config.data import Data, DataSource, WorkplaceEnv
from slurmkit.envs.environment import Message, Opening, Score, Task, TaskSource, Tool, ToolCall
from slurmkit.envs.tasks import read_sources
from slurmkit.envs.workplace.company import make_world
from slurmkit.envs.workplace.desk import Desk, as_text
from slurmkit.envs.workplace.scoring import Call, end_state, reward
from slurmkit.envs.workplace.table import Table
from slurmkit.envs.workplace.tasks import Goal, ToolSets, read_tasks
from slurmkit.envs.workplace.world import World
from slurmkit.errors import UserError

# Bad rows that a message names of each source, as there may be thousands.
_NAMED = 5
_KNOWN_GOALS = 4096


class _Known(NamedTuple):
    """What is worked out once for all episodes of a task."""

    tools: tuple[Tool, ...]
    tables: tuple[Table, ...]
    """As the task's own calls leave them."""


class Workplace:
    """Tasks from files, checked against the databases. UserError names bad rows of every source by file and line."""

    def __init__(self, config: WorkplaceEnv, data: Data) -> None:
        self.config = config
        self.world = make_world(config.world_seed) if config.databases is None else World.read(Path(config.databases))
        self.start = Desk(self.world).tables
        tool_sets = ToolSets()

        def read(key: str, source: DataSource) -> list[Task]:
            found = list(read_tasks(source, key, self.world, tool_sets))
            tasks = [each for each in found if isinstance(each, Task)]
            bad = [str(each) for each in found if isinstance(each, UserError)]
            more = [f"{source.data_path}: {len(bad) - _NAMED} more bad rows"] if len(bad) > _NAMED else []
            told = [*bad[:_NAMED], *more]
            if told and not (config.skip_bad_rows and tasks):
                raise UserError("\n".join(told))
            for line in told:
                print(f"left out: {line}", file=sys.stderr)
            return tasks

        train, held_out = read_sources(data, read)
        self.train_sources: Sequence[TaskSource] = train
        self.train_tasks: Sequence[Task] = [task for source in train for task in source.tasks]
        self.validation_tasks: Sequence[Task] = held_out

        @lru_cache(maxsize=_KNOWN_GOALS)
        def known(answer: str) -> _Known:
            goal = Goal.of(answer)
            return _Known(tool_sets[goal.tools], end_state(self.world, goal.calls))

        self.known = known

    def environment(self) -> _Episode:
        return _Episode(self)

    def demonstrate(self, task: Task, rng: Random) -> str:
        """A call as Hermes and Qwen write it: one of the task's own, whichever."""
        calls = Goal.of(task.answer).calls
        if not calls:
            return "Nothing is to be done."
        name, arguments = rng.choice(calls)
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class _Episode:
    def __init__(self, domain: Workplace) -> None:
        self._domain = domain
        self._desk = Desk(domain.world)
        self._answer = ""
        self._calls: list[Call] = []
        self._turns = 0
        self._looked = False

    async def start(self, task: Task) -> Opening:
        self._answer = task.answer
        return Opening(task.messages, self._domain.known(task.answer).tools)

    async def step(self, reply: Message) -> Sequence[Message]:
        self._turns += 1
        answers = [self._answered(call) for call in reply.tool_calls]
        return answers if self._turns < self._domain.config.max_turns else ()

    def _answered(self, call: ToolCall) -> Message:
        self._calls.append((call.name, call.arguments))
        try:
            arguments = json.loads(call.arguments)
            if not isinstance(arguments, dict):
                raise TypeError(f"must be a JSON object, found {type(arguments).__name__}")
        except (ValueError, TypeError, RecursionError) as error:
            text = json.dumps({"error": f"Invalid tool call arguments: {error!r}"})
        else:
            found, worked = self._desk.answer(call.name, arguments)
            self._looked = self._looked or worked
            text = as_text(found)
        return Message("tool", text, tool_call_id=call.id, name=call.name)

    async def score(self) -> Score:
        domain = self._domain
        # By what was called and not by the desk: a server drops arguments that are null, a verdict does not.
        predicted = end_state(domain.world, self._calls)
        gold = domain.known(self._answer).tables
        found = reward(domain.start, predicted, gold, domain.config.scoring, looked=self._looked)
        return Score(reward=found, correct=found == 1.0)
