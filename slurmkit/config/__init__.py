"""The training configuration: the one thing that the login node and the trainer share."""

from slurmkit.config.load import load_config
from slurmkit.config.schema import TrainConfig

__all__ = ["TrainConfig", "load_config"]
