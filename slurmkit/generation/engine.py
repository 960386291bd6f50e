"""What an engine is asked and what it answers: tokens in, tokens out. Nothing here knows a loss or an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy
from numpy.typing import NDArray

from slurmkit.generation.weights import SavedWeights, SharedWeights, StreamedWeights, Weights

FinishReason = Literal["stop", "length", "prompt_too_long"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one completion is drawn. Its tokens follow from `seed` alone, whoever shares the batch.

    `temperature` 0 takes the likeliest token; logprobs are then those of temperature 1. At any other one `top_k` leaves
    so many likeliest tokens, and `top_p` of those the likeliest that together have at least this probability.

    `stop_token_ids` end a completion as the end-of-sequence token does. Before `min_new_tokens` none of these can be
    drawn, nor what the model's folder says that it ends with; logprobs are those of what is left.
    """

    temperature: float
    max_new_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One completion: the sampled tokens, the one that ended it kept, and nothing after it.

    `logprobs` are natural logarithms under the distribution that was sampled from, temperature and truncation included;
    NaN where the engine could not tell. `text` is what the tokens say, without special tokens: engines are many, and
    the driver, who would otherwise decode for all of them, is one. `weight_versions` counts for each token the updates
    that its weights had seen.

    Example: Completion(
        token_ids=numpy.array([49, 50, 257], numpy.int32), logprobs=numpy.array([-0.3, -1.2, -0.01], numpy.float32),
        text="12", finish_reason="stop", weight_versions=numpy.array([4, 4, 5], numpy.int32))
    """

    token_ids: NDArray[numpy.int32]
    logprobs: NDArray[numpy.float32]
    text: str
    finish_reason: FinishReason
    weight_versions: NDArray[numpy.int32]

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.logprobs) == len(self.weight_versions):
            raise ValueError(
                f"{len(self.token_ids)} tokens with {len(self.logprobs)} logprobs and {len(self.weight_versions)} "
                "versions"
            )


def completion_of(
    tokenizer: Any, token_ids: list[int], logprobs: list[float], reason: FinishReason, versions: int | list[int]
) -> Completion:
    """What an engine sampled, with the text that it says; `versions` of each token, or of all."""
    return Completion(
        token_ids=numpy.array(token_ids, numpy.int32),
        logprobs=numpy.array(logprobs, numpy.float32),
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        finish_reason=reason,
        weight_versions=numpy.full(len(token_ids), versions, numpy.int32),
    )


class Engine(Protocol):
    """Text generation on one node. The methods of an engine may be coroutines."""

    def start(self) -> None:
        """Called once, before anything else; ends when the engine can be asked."""

    def submit(self, requests: Mapping[int, Request]) -> None:
        """Take requests, each under a ticket that no other has. A prompt that does not fit is a finish reason."""

    def collect(self) -> Mapping[int, Completion]:
        """What has been finished since the last time, by ticket; waits until something is."""

    def abort(self, tickets: Sequence[int]) -> None:
        """Forget requests that nobody waits for any more, as far as they are not finished; a `collect` that waits for
        them returns. What has been begun may be finished where there is no way to stop it, and is collected then."""

    def connect(self, way: str, address: str, port: int, first_rank: int, size: int, timeout_seconds: float) -> None:
        """Join a channel (`generation/channels.py`) on which weights will come, with as many ranks as there are
        processes, the first of which is `first_rank`. The one before is left."""

    def load(self, weights: Weights | SharedWeights | SavedWeights | StreamedWeights) -> list[str]:
        """Take over new weights. What is under way is finished with the old ones first, or, in an engine that was made
        so, goes on with the new ones. ValueError where they are not this model's; then nothing has changed.

        Gives the digest of what each process has been sent, where streamed weights ask for it."""
