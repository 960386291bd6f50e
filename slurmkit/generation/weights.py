"""Weights on their way from the policy to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's whole state under its Hugging Face names, on the CPU, and how many updates it has seen."""

    version: int
    tensors: Mapping[str, torch.Tensor]


def check_manifest(held: Mapping[str, torch.Tensor], offered: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes of what an engine holds with what it is offered. ValueError lists the differences."""
    problems = [f"{name} is missing" for name in held.keys() - offered.keys()]
    problems += [f"{name} is not in the engine's model" for name in offered.keys() - held.keys()]
    problems += [
        f"{name} is {tuple(offered[name].shape)}, the engine holds {tuple(held[name].shape)}"
        for name in held.keys() & offered.keys()
        if held[name].shape != offered[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(f"the policy's weights do not fit the engine ({len(problems)} differences): {shown}")
