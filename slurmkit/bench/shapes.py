"""Architectures by their numbers: no download, and nothing heavy imported."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slurmkit.errors import UserError


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 of random weights. Names are those of its configuration in transformers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    tie_word_embeddings: bool


# vocab, hidden, layers, heads, key-value heads, head size, intermediate, tied
SHAPES = {
    "tiny": Shape(512, 32, 2, 2, 2, 16, 64, False),
    "0.4m": Shape(512, 128, 2, 4, 4, 32, 288, False),
    "1m": Shape(512, 128, 6, 4, 4, 32, 288, False),
    "20m": Shape(512, 512, 6, 8, 8, 64, 1536, False),
    "small": Shape(32_768, 256, 4, 4, 2, 64, 768, True),
    "100m": Shape(32_768, 640, 16, 10, 10, 64, 2048, True),
    "qwen3-0.6b": Shape(151_936, 1024, 28, 16, 8, 128, 3072, True),
    "qwen3-4b": Shape(151_936, 2560, 36, 32, 8, 128, 9728, True),
}


def shape_of(name: str, vocab_size: int | None = None) -> Shape:
    """The shape of that name, with another vocabulary where one is given. UserError where there is none."""
    if name not in SHAPES:
        raise UserError(f"--shape {name}: there is no such shape; there are {', '.join(SHAPES)}")
    return SHAPES[name] if vocab_size is None else replace(SHAPES[name], vocab_size=vocab_size)
