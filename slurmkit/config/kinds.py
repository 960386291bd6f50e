"""Kinds of numbers that the training configuration's keys are of."""

from __future__ import annotations

from typing import Annotated

from slurmkit.config.section import Field

Count = Annotated[int, Field(ge=1)]
# A year: what waits must have a deadline, and timers overflow far above.
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
