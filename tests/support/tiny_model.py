"""A model and a configuration small enough for a test, made by the trainer's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slurmkit.config.data import ArithmeticEnv
from slurmkit.config.model import FromScratch
from slurmkit.config.schema import TrainConfig
from slurmkit.envs.arithmetic import Arithmetic

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}


def tiny_config(folder: Path, **sections: dict[str, Any]) -> TrainConfig:
    """Four samples a step on one CPU rank; `sections` are merged over it, key by key."""
    config: dict[str, dict[str, Any]] = {
        "grpo": {"num_prompts_per_step": 2, "num_generations_per_prompt": 2},
        "checkpointing": {"checkpoint_dir": str(folder)},
        "policy": {
            "from_scratch": SIZES,
            "train_global_batch_size": 4,
            "max_total_sequence_length": 64,
            "precision": "float32",
        },
        "env": {"name": "arithmetic"},
        "cluster": {"gpus_per_node": 0},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    return TrainConfig.model_validate(config)


def make_tiny_model(
    folder: Path, *, seed: int = 0, supervised_steps: int = 0, max_length: int = 64, **sizes: int
) -> Path:
    """A model that knows nothing, or a little after some supervised steps. `sizes` take the place of SIZES."""
    from slurmkit.grpo.from_scratch import make_model

    given = FromScratch.model_validate({**SIZES, **sizes, "supervised_steps": supervised_steps})
    make_model(folder, given, Arithmetic(ArithmeticEnv(), seed), max_length=max_length, seed=seed)
    return folder
