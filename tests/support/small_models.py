"""Small models of transformers' own architectures, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def make_model(folder: Path, config: Any) -> Path:
    """The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """Grouped heads, tied embeddings, and a width (66) that two halves of two ranks cannot share evenly."""
    sizes: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 66,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }
    return make_model(folder, LlamaConfig(**sizes | changes))
