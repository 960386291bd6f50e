"""Models of random weights, whole with a tokenizer, as engines want them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from slurmkit.bench.shapes import Shape
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
