"""Kinds of numbers that the training configuration's keys are of."""

from __future__ import annotations

from typing import Annotated, Any

from slurmkit.config.section import Field

Count = Annotated[int, Field(ge=1)]
# A year: what waits must have a deadline, and timers overflow far above.
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def empty_if_null(value: Any) -> Any:
    """Return {} for None: NeMo RL writes null for a section or mapping that has its defaults."""
    return {} if value is None else value
