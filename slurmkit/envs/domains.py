"""From env.name to the domain it means."""

from __future__ import annotations

from slurmkit.config.schema import TrainConfig
from slurmkit.envs.arithmetic import Arithmetic
from slurmkit.envs.environment import Domain
from slurmkit.envs.gym.domain import Gym
from slurmkit.envs.math import Math
from slurmkit.envs.workplace.domain import Workplace


def make_domain(config: TrainConfig) -> Domain:
    """The domain that the configuration names, its tasks read. UserError for data that cannot be used."""
    match config.env.name:
        case "arithmetic":
            return Arithmetic(config.env.arithmetic, config.grpo.seed)
        case "math":
            return Math(config.env.math, config.data)
        case "workplace":
            return Workplace(config.env.workplace, config.data)
        case "gym":
            return Gym(config)
