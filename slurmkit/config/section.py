"""The one shape that every group of keys has, of a job as of a training configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of keys. Unknown keys and values of another type are refused."""

    # Validators are built on first use: a command loads many sections and validates few.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)
