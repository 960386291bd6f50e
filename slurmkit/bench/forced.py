"""The work that both sides of `slurmkit bench train` get: questions, completion lengths and rewards.

Nothing is imported but the standard library, as TRL's environment holds nothing else of slurmkit.
"""

from __future__ import annotations

from random import Random

QUESTIONS = [f"{a} {b} {c}" for a in range(10) for b in range(10) for c in range(10)]
# Number of tokens of a question, with the chat template of the byte tokenizer.
PROMPT_TOKENS = 8


def lengths(seed: int, step: int, count: int, mean: float, most: int) -> list[int]:
    """Return the number of tokens of each completion of a step: exponentially distributed, from 1 to `most`."""
    rng = Random(f"lengths {seed} {step}")
    return [min(most, 1 + int(rng.expovariate(1 / max(1.0, mean - 0.5)))) for _ in range(count)]


def reward(text: str) -> float:
    """Return a number that follows from the text alone and differs within a group, so that no completion is skipped."""
    return sum(map(ord, text)) % 997 / 997
