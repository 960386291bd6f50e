"""Architectures by their numbers, and what a token of each costs: no download, and nothing heavy imported."""

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

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token is multiplied with: the output embedding counts, the input embedding does not."""
        attention = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        per_layer = self.hidden_size * (attention + 3 * self.intermediate_size)
        return self.num_hidden_layers * per_layer + self.vocab_size * self.hidden_size

    def flops_per_token(self, length: int) -> int:
        """Forward and backward of one token of a sequence of `length`, as prime-rl counts (trainer/perf.py).

        6 for each matmul parameter, and 12 · layers · hidden size · length for attention, of which causal attention
        needs half: not counted as less, and recomputed activations not as more.
        """
        return 6 * self.matmul_parameters + 12 * self.num_hidden_layers * self.hidden_size * length


# vocab, hidden, layers, heads, key-value heads, head size, intermediate, tied
SHAPES = {
    "tiny": Shape(512, 32, 2, 2, 2, 16, 64, False),
    "small": Shape(32_768, 256, 4, 4, 2, 64, 768, True),
    "qwen3-0.6b": Shape(151_936, 1024, 28, 16, 8, 128, 3072, True),
    "qwen3-4b": Shape(151_936, 2560, 36, 32, 8, 128, 9728, True),
}


def shape_of(name: str, vocab_size: int | None = None) -> Shape:
    """The shape of that name, with another vocabulary where one is given. UserError where there is none."""
    if name not in SHAPES:
        raise UserError(f"--shape {name}: there is no such shape; there are {', '.join(SHAPES)}")
    return SHAPES[name] if vocab_size is None else replace(SHAPES[name], vocab_size=vocab_size)
