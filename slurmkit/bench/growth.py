"""Whether peak memory grows with vocabulary × tokens: forward and backward at several of each, in fresh processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slurmkit.bench.child import measured
from slurmkit.bench.shapes import shape_of

# Float32 master weight, gradient and AdamW's two moments.
_BYTES_PER_PARAMETER = 16
_MIB = 2**20


def measure(sizes: Sequence[int], given: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Peaks of one micro-batch at the smallest and the largest vocabulary, each at half of the tokens and at all.

    What weights take does not depend on the tokens, what activations take not on the vocabulary: the difference of the
    two differences is what depends on both, however much there is of either.
    """
    few, many = min(sizes), max(sizes)
    whole = measured("fake_data", {**given, "vocab_size": many, "micro_batches": 1, "steps": 2})
    tokens, shape = whole["settings"]["seq_length"], shape_of(whole["settings"]["shape"])
    peaks = {(many, tokens): whole["figures"]["peak_memory_mib"]}
    for size, length in ((few, tokens), (few, tokens // 2), (many, tokens // 2)):
        say(f"a vocabulary of {size}, {length} tokens")
        settings = {**given, "vocab_size": size, "seq_length": length, "micro_batches": 1, "steps": 2}
        peaks[size, length] = measured("fake_data", settings)["figures"]["peak_memory_mib"]
    growth = {length: peaks[many, length] - peaks[few, length] for length in (tokens // 2, tokens)}
    embeddings = 1 if shape.tie_word_embeddings else 2
    weights = _BYTES_PER_PARAMETER * embeddings * (many - few) * shape.hidden_size / _MIB
    figures = {
        "peaks": [
            {"vocabulary": size, "tokens": length, "peak_memory_mib": peak}
            for (size, length), peak in sorted(peaks.items())
        ],
        "growth_beyond_weights_mib": growth[tokens] - weights,
        "growth_with_vocabulary_and_tokens_mib": growth[tokens] - growth[tokens // 2],
        "such_a_tensor_would_grow_mib": 4 * (many - few) * (tokens - tokens // 2) / _MIB,
    }
    return {"settings": {**whole["settings"], "vocab_size": sorted(sizes)}, "figures": figures}


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """In Markdown."""
    yield "| vocabulary | tokens | peak MiB |"
    yield "|---:|---:|---:|"
    for row in figures["peaks"]:
        yield f"| {row['vocabulary']} | {row['tokens']} | {row['peak_memory_mib']:,.1f} |"
    yield ""
    beyond, mixed = figures["growth_beyond_weights_mib"], figures["growth_with_vocabulary_and_tokens_mib"]
    yield f"growth with the vocabulary, beyond weights, gradients and moments: {beyond:,.1f} MiB"
    tensor = figures["such_a_tensor_would_grow_mib"]
    yield f"growth with vocabulary × tokens: {mixed:,.1f} MiB; a float32 [tokens, vocabulary] grows by {tensor:,.1f}"
