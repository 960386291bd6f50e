"""Models of random weights with a tokenizer. `python -m slurmkit.bench.random_model` writes one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from slurmkit.bench.child import answer
from slurmkit.bench.shapes import Shape, shape_of
from slurmkit.grpo.from_scratch import byte_tokenizer


def write_model(folder: Path, shape: Shape, max_length: int, seed: int) -> int:
    """Write a model for up to `max_length` tokens. Returns how many parameters it has."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        **asdict(shape),
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = Qwen3ForCausalLM._from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def _write(settings: dict[str, Any]) -> dict[str, Any]:
    shape = shape_of(settings["shape"])
    return {"parameters": write_model(Path(settings["folder"]), shape, settings["max_length"], seed=0)}


if __name__ == "__main__":
    answer(_write)
