"""The algorithm's keys: how groups are drawn and judged, and the loss."""

from __future__ import annotations

from typing import Annotated, Self

from slurmkit.config.kinds import Count
from slurmkit.config.section import Field, Section, model_validator


class Grpo(Section):
    num_prompts_per_step: Count = 32
    """Tasks that a step draws."""
    num_generations_per_prompt: Count = 16
    """Episodes per task: the size of a group."""
    max_num_epochs: Count = 1
    """Passes over the training tasks, at most."""
    max_num_steps: Count = 1_000_000
    """Steps, at most."""
    normalize_rewards: bool = True
    """Divide a group's advantages by its standard deviation (GRPO); false is Dr. GRPO."""
    use_leave_one_out_baseline: bool = True
    """Compare an episode with the mean (and spread) of the others of its group, not of all of it."""
    val_period: Annotated[int, Field(ge=0)] = 10
    """Validate after every so many steps; 0 is never."""
    val_at_start: bool = False
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    max_val_samples: Count | None = 256
    """Validation tasks, at most; null is all of them."""
    max_steps_without_signal: Count | None = 10
    """Give up after so many steps in a row in which no group had a right and a wrong answer; null never does."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 42
    """Everything random follows from it: the order of tasks, every sampled token, a model made from scratch."""

    @model_validator(mode="after")
    def _a_group_can_differ(self) -> Self:
        if self.num_generations_per_prompt == 1:
            raise ValueError(
                "num_generations_per_prompt is 1: an advantage compares the episodes of one task, so it needs 2 or more"
            )
        return self


class LossFn(Section):
    ratio_clip_min: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The importance ratio is clipped below 1 minus this."""
    ratio_clip_max: Annotated[float, Field(ge=0)] = 0.2
    """The importance ratio is clipped above 1 plus this; larger than ratio_clip_min is DAPO's clip-higher."""
    token_level_loss: bool = True
    """Every trained token of an optimiser step counts alike (DAPO); false counts every episode alike (GRPO)."""
    constant_length: Count | None = None
    """With token_level_loss false: divide an episode's sum by this instead of its own length (Dr. GRPO)."""

    @model_validator(mode="after")
    def _one_normalization(self) -> Self:
        if self.token_level_loss and self.constant_length is not None:
            raise ValueError(
                f"constant_length {self.constant_length} is what an episode's sum is divided by, and token_level_loss "
                "true divides by the tokens of the whole optimiser step: set token_level_loss to false, or "
                "constant_length to null"
            )
        return self
