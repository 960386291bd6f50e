"""The keys of tasks: where they come from, and who judges the answers."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, TypeVar

from slurmkit.config.kinds import Count, Finite, Positive, Seconds, empty_if_null
from slurmkit.config.section import AfterValidator, BeforeValidator, Field, Section, model_validator

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


class DataSource(Section):
    data_path: str | None = None
    """A JSONL or Parquet file, a folder that the `datasets` library opens, or, with split, a data set on the hub."""
    input_key: str = "question"
    """The key, or column, of what is put to the model: text, or a list of messages that ends with the user's. One
    inside another is named as extra.prompt."""
    output_key: str = "answer"
    """The key, or column, of the text that its reply is compared with, such as reward_model.ground_truth."""
    subset: str | None = None
    """The configuration of a data set on the hub, where it has several."""
    split: str | None = None
    """The split of a folder of the `datasets` library or of a data set on the hub, as train or "train[:1000]"."""

    @property
    def may_be_on_hub(self) -> bool:
        """Whether data_path is a name on the hub, if it is no path."""
        return self.split is not None and HUB_NAME.fullmatch(self.data_path or "") is not None

    @model_validator(mode="after")
    def _subset_is_of_the_hub(self) -> Self:
        if self.subset is not None and self.split is None:
            raise ValueError(f"subset {self.subset} is of a data set on the hub, which needs split as well")
        return self


def _part_or_count(value: float) -> float:
    if value >= 1 and value % 1:
        raise ValueError(f"should be a part below 1 or a whole number of questions, not {value:g}")
    return value


class TrainSource(DataSource):
    weight: Positive | None = None
    """Its share of the tasks drawn, relative to the other sources of the list; null for all of them draws every task
    once per epoch."""
    split_validation_size: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_part_or_count)] = 0.0
    """The part of its questions that is held out for validation, or from 1 on their number."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 42
    """Which those are follows from it, and not from grpo.seed: runs of other seeds are measured alike."""


class Data(Section):
    train: TrainSource | Annotated[tuple[TrainSource, ...], Field(min_length=1)] = TrainSource()
    """Tasks to train on: one source, or a list of them."""
    validation: Annotated[
        DataSource | Annotated[tuple[DataSource, ...], Field(min_length=1)], BeforeValidator(empty_if_null)
    ] = DataSource()
    """Tasks held out, besides those that data.train holds out of itself: one source, or a list of them."""
    shuffle: bool = True
    """Draw tasks in an order that follows from grpo.seed, another one each epoch."""

    @property
    def train_sources(self) -> dict[str, TrainSource]:
        """Each source that is trained on, under its dotted key."""
        return _named("data.train", self.train)

    @property
    def validation_sources(self) -> dict[str, DataSource]:
        """Each source that is only validated on, under its dotted key."""
        return _named("data.validation", self.validation)

    @property
    def sources(self) -> dict[str, DataSource]:
        """All of them."""
        return {**self.train_sources, **self.validation_sources}

    @model_validator(mode="after")
    def _all_are_weighted_or_none(self) -> Self:
        weights = {key: source.weight for key, source in self.train_sources.items()}
        if len(weights) == 1 and (weight := weights.get("data.train")) is not None:
            raise ValueError(
                f"train.weight {weight:g} is relative to other sources, of which there are none: leave it out, or give "
                "data.train as a list"
            )
        if None in weights.values() and any(weights.values()):
            shown = ", ".join(f"{key}.weight {'null' if w is None else f'{w:g}'}" for key, w in weights.items())
            raise ValueError(f"either all sources of data.train have a weight or none has, found {shown}")
        return self


Kind = TypeVar("Kind", bound=DataSource)


def _named(key: str, found: Kind | tuple[Kind, ...]) -> dict[str, Kind]:
    return {f"{key}.{i}": each for i, each in enumerate(found)} if isinstance(found, tuple) else {key: found}


class ArithmeticEnv(Section):
    num_terms: Annotated[int, Field(ge=2, le=4)] = 3
    """Digits to add up."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The part of all problems that is held out for validation."""
    demonstration_error: Annotated[int, Field(ge=0)] = 3
    """Demonstrations are off by up to this much either way, evenly: a model that copies them is right 1 in 2e+1."""


class MathEnv(Section):
    num_workers: Count = 4
    """Processes on the driver's node that compare answers which are no plain numbers; they start with the first one."""
    verify_timeout_seconds: Seconds = 5.0
    """How long one comparison may take; an answer that takes longer counts as wrong."""
    demonstration_error: Annotated[int, Field(ge=0)] = 3
    """As for arithmetic: demonstrated answers are off by up to this much."""


def _server(url: str) -> str:
    if re.fullmatch(r"https?://[^/@\s?#]+(/[^@\s?#]*)?", url) is None:
        shown = url.rpartition("@")[2]  # before it there may be a password
        raise ValueError(f"should be http://HOST:PORT, without a user or a question mark, not {shown!r}")
    return url.rstrip("/")


class GymEnv(Section):
    url: Annotated[str, AfterValidator(_server)] | None = None
    """A resources server: its tools are called and its judgement asked for; the conversation is held here."""
    agent_url: Annotated[str, AfterValidator(_server)] | None = None
    """Or an agent server, which holds the conversation itself, with the policy over HTTP."""
    correct_reward: Finite = 1.0
    """The least reward of an episode that counts as right in accuracies."""
    max_connections: Count = 1024
    """Requests that the server is sent at the same time; more of them wait."""
    max_retries: Annotated[int, Field(ge=0)] = 4
    """How often a request is repeated that the server cannot have carried out."""
    max_response_bytes: Count = 32 * 1024 * 1024
    """What any one answer of the server may have: an episode with more than that is counted as broken."""
    start_timeout_seconds: Seconds = 60.0
    """How long the server may take to be there when the run starts."""


class WorkplaceEnv(Section):
    databases: str | None = None
    """A folder with WorkBench's or NeMo Gym's CSV files; null makes a company up, which follows from world_seed."""
    world_seed: Annotated[int, Field(ge=0)] = 0
    """Which company is made up. Tasks of `slurmkit data workplace` belong to the one that they were made for."""
    scoring: Literal["gym", "strict"] = "gym"
    """Which end states count as equal: gym as NeMo Gym compares, quirks included; strict in any order, and where
    nothing was to be changed only if some tool was used. docs/workplace.md has both in full."""
    max_turns: Count = 6
    """Replies of an episode: the calls of the last are still carried out."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and tell how many, in place of ending the run."""


class Env(Section):
    name: Literal["arithmetic", "math", "workplace", "gym"]
    """arithmetic makes its own problems; math reads its tasks from data and compares answers; workplace reads tasks
    that are done by tool calls, and compares databases; gym reads NeMo Gym's rows from data and asks a NeMo Gym
    server."""
    timeout_seconds: Seconds = 600.0
    """How long an environment may take over any one call; an episode that waits longer is counted as broken."""
    episode_timeout_seconds: Seconds | None = None
    """How long a whole episode may take from its opening on; then it ends and is judged as it stands. null waits for
    it."""
    max_tool_output_chars: Count = 20_000
    """Characters of any one answer to the model, such as a tool's output; of a longer one the beginning is given, and
    how much is missing."""
    arithmetic: ArithmeticEnv = ArithmeticEnv()
    """Sums of digits."""
    math: MathEnv = MathEnv()
    """Problems with one answer, GSM8K's or DAPO's."""
    workplace: WorkplaceEnv = WorkplaceEnv()
    """The Workplace Assistant: NeMo Gym's rows, or WorkBench's tasks."""
    gym: GymEnv = GymEnv()
    """A NeMo Gym server over HTTP."""

    @model_validator(mode="after")
    def _gym_has_one_server(self) -> Self:
        if self.name == "gym" and (self.gym.url is None) == (self.gym.agent_url is None):
            found = "both are given" if self.gym.url else "neither is given"
            raise ValueError(f"name gym needs a server, either gym.url or gym.agent_url: {found}")
        return self
