"""The keys of tasks: where they come from, and who judges the answers."""

from __future__ import annotations

from typing import Annotated, Literal

from slurmkit.config.kinds import Seconds
from slurmkit.config.section import Field, Section


class DataSource(Section):
    data_path: str | None = None
    """A JSONL file, one task per line."""


class Data(Section):
    train: DataSource = DataSource()
    """Tasks to train on."""
    validation: DataSource = DataSource()
    """Tasks held out."""
    shuffle: bool = True
    """Draw tasks in an order that follows from grpo.seed, another one each epoch."""


class ArithmeticEnv(Section):
    num_terms: Annotated[int, Field(ge=2, le=4)] = 3
    """Digits to add up."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The part of all problems that is held out for validation."""
    demonstration_error: Annotated[int, Field(ge=0)] = 3
    """Demonstrations are off by up to this much either way, evenly: a model that copies them is right 1 in 2e+1."""


class MathEnv(Section):
    demonstration_error: Annotated[int, Field(ge=0)] = 3
    """As for arithmetic: demonstrated answers are off by up to this much."""


class Env(Section):
    name: Literal["arithmetic", "math"]
    """arithmetic makes its own problems; math reads rows {"question", "answer"} and compares numbers."""
    timeout_seconds: Seconds = 600.0
    """How long an environment may take over any one call; an episode that waits longer is counted as broken."""
    arithmetic: ArithmeticEnv = ArithmeticEnv()
    """Sums of digits."""
    math: MathEnv = MathEnv()
    """Word problems, GSM8K's format."""
