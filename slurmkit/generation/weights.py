"""Weights on their way from the policy to an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load_file

from slurmkit.generation.shared_tensors import Entry, read

Way = Literal["shared", "broadcast", "ipc", "disk"]
"""From policy to engine: memory of their node, a process group's broadcast, memory of their GPU, or a file."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's whole state under its Hugging Face names, on the CPU, and how many updates it has seen."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    digest: str | None = None
    """What `digest` said of the tensors where they were made, if whoever receives them is to compare."""

    def opened(self) -> Weights:
        """Itself; see `SharedWeights`."""
        return self


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Weights that lie in another process of this machine, until that writes the next ones."""

    version: int
    path: str
    table: Sequence[Entry]
    digest: str | None = None

    def opened(self) -> Weights:
        """Their tensors, where they lie."""
        return Weights(self.version, dict(read(self.path, self.table)), self.digest)


@dataclass(frozen=True, slots=True)
class SavedWeights:
    """Weights in a safetensors file that engine and policy see, until the next ones are there."""

    version: int
    path: str
    table: Sequence[Entry]
    digest: str | None = None

    def opened(self) -> Weights:
        """Their tensors, mapped from the file."""
        return Weights(self.version, load_file(self.path), self.digest)


@dataclass(frozen=True, slots=True)
class StreamedWeights:
    """Weights that come over the channel to which the engine is connected."""

    version: int
    table: Sequence[Entry]
    wants_digest: bool = False
    """Whether an engine's `load` is to say which digest what came has, in the table's order."""


def check_manifest(held: Mapping[str, torch.Tensor], offered: Mapping[str, torch.Tensor | Entry]) -> None:
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


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_digest(weights: Weights | SharedWeights | SavedWeights, arrived: str) -> None:
    """ValueError where what arrived is not what was sent."""
    if weights.digest is not None and weights.digest != arrived:
        raise ValueError(
            f"the weights of version {weights.version} changed on the way: SHA-256 {weights.digest} was sent, "
            f"{arrived} arrived"
        )
