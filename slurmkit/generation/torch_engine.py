"""The embedded engine: batched sampling through transformers' own forward pass, with a KV cache.

For machines without vLLM, for models small enough that a Python loop per token does not matter, and as the exact
reference for other engines.

Shapes: B rows still sampling, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from slurmkit.generation.channels import Channel, connect, digested, receive
from slurmkit.generation.engine import Completion, FinishReason, Request, SamplingParams, completion_of
from slurmkit.generation.machine import use_gpus
from slurmkit.generation.weights import (
    SavedWeights,
    SharedWeights,
    StreamedWeights,
    Weights,
    check_digest,
    check_manifest,
    digest,
)


@dataclass(slots=True)
class _Row:
    """One request while it is sampled."""

    request: Request
    budget: int
    rng: numpy.random.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TorchEngine:
    """An `Engine` in this process."""

    def __init__(
        self,
        model_path: str,
        *,
        precision: str,
        max_total_length: int,
        max_batch_size: int,
        weight_version: int = 0,
        threads: int | None = None,
        device: str = "cpu",
        gpus: Sequence[str] = (),
        trust_remote_code: bool = False,
    ) -> None:
        """Load model and tokenizer from a folder. `max_total_length` counts prompt and completion, in tokens.

        `gpus` is the one to use, as CUDA_VISIBLE_DEVICES names it.
        """
        use_gpus(gpus)
        if threads is not None:
            torch.set_num_threads(threads)
        disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, precision), trust_remote_code=trust_remote_code
        ).to(device)
        self._model.eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        self._eos_id = int(self._tokenizer.eos_token_id)
        said = self._model.generation_config.eos_token_id
        self._ends = {self._eos_id, *(said if isinstance(said, list) else () if said is None else (said,))}
        self._max_total_length = max_total_length
        self._max_batch_size = max_batch_size
        self._device = device
        self._version = weight_version
        self._submitted: dict[int, Request] = {}
        self._channel: Channel

    def start(self) -> None:
        """There since it was made."""

    def submit(self, requests: Mapping[int, Request]) -> None:
        self._submitted |= requests

    def collect(self) -> dict[int, Completion]:
        submitted, self._submitted = self._submitted, {}
        return dict(zip(submitted, self.generate(list(submitted.values())), strict=True))

    def abort(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            self._submitted.pop(ticket, None)

    def connect(self, way: str, address: str, port: int, first_rank: int, size: int, timeout_seconds: float) -> None:
        device = self._model.device
        self._channel = connect(
            way, address, port, rank=first_rank, size=size, device=device, timeout_seconds=timeout_seconds
        )

    def load(self, weights: Weights | SharedWeights | SavedWeights | StreamedWeights) -> list[str]:
        state, digests = self._model.state_dict(), list[str]()
        if isinstance(weights, StreamedWeights):
            check_manifest(state, {entry.name: entry for entry in weights.table})
            tensors = receive(self._channel, weights.table)
            if weights.wants_digest:
                tensors = digested(tensors, digests)
        else:
            weights = weights.opened()
            check_manifest(state, weights.tensors)
            if weights.digest is not None:
                check_digest(weights, digest(weights.tensors))
            tensors = iter(weights.tensors.items())
        for name, tensor in tensors:
            state[name].copy_(tensor)
        self._version = weights.version
        return digests

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the same order."""
        completions: list[Completion | None] = [None] * len(requests)
        # Prompts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        fitting = [index for index in order if len(requests[index].prompt_ids) < self._max_total_length]
        for index in order[len(fitting) :]:
            completions[index] = self._completion([], [], "prompt_too_long")
        for first in range(0, len(fitting), self._max_batch_size):
            batch = fitting[first : first + self._max_batch_size]
            for index, completion in zip(batch, self._sample([requests[i] for i in batch]), strict=True):
                completions[index] = completion
        return [completion for completion in completions if completion is not None]

    @torch.inference_mode()
    def _sample(self, requests: Sequence[Request]) -> list[Completion]:
        rows = [
            _Row(
                request,
                budget=min(request.sampling.max_new_tokens, self._max_total_length - len(request.prompt_ids)),
                rng=numpy.random.default_rng(request.sampling.seed),
            )
            for request in requests
        ]
        # The requests of a group share a prompt, which is computed once.
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        place = {prompt: index for index, prompt in enumerate(prompts)}
        # Left padding: every row's newest token is in the last column.
        width = max(map(len, prompts))
        ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
        attended_BT = torch.zeros(len(prompts), width, dtype=torch.long)
        for b, prompt in enumerate(prompts):
            ids_BT[b, width - len(prompt) :] = torch.tensor(prompt)
            attended_BT[b, width - len(prompt) :] = 1
        ids_BT, attended_BT = ids_BT.to(self._device), attended_BT.to(self._device)
        positions_BT = (attended_BT.cumsum(-1) - 1).clamp(min=0)
        output = self._forward(ids_BT, attended_BT, positions_BT, None)
        cache, logits_BV = output.past_key_values, output.logits[:, -1].float()
        if len(prompts) < len(rows):
            place_B = torch.tensor([place[request.prompt_ids] for request in requests], device=self._device)
            cache.batch_select_indices(place_B)
            logits_BV, attended_BT, positions_BT = logits_BV[place_B], attended_BT[place_B], positions_BT[place_B]
        sampling = rows
        while True:
            token_B = self._draw(logits_BV, sampling)
            unfinished = [b for b, row in enumerate(sampling) if self._reason(row) is None]
            if not unfinished:
                return [self._completion(row.token_ids, row.logprobs, self._reason(row) or "stop") for row in rows]
            if len(unfinished) < len(sampling):
                kept = torch.tensor(unfinished, device=self._device)
                cache.batch_select_indices(kept)
                token_B, attended_BT, positions_BT = token_B[kept], attended_BT[kept], positions_BT[kept]
                sampling = [sampling[b] for b in unfinished]
            ids_BT = token_B[:, None]
            attended_BT = torch.cat([attended_BT, torch.ones_like(ids_BT)], dim=1)
            positions_BT = positions_BT[:, -1:] + 1
            logits_BV = self._forward(ids_BT, attended_BT, positions_BT, cache).logits[:, -1].float()

    def _forward(self, ids_BT: torch.Tensor, attended_BT: torch.Tensor, positions_BT: torch.Tensor, cache: Any) -> Any:
        """Compute the next token's logits and extend the cache."""
        return self._model(
            input_ids=ids_BT,
            attention_mask=attended_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _draw(self, logits_BV: torch.Tensor, rows: Sequence[_Row]) -> torch.Tensor:
        """Add one token to each row by inverting the cumulative distribution at the row's own uniform number."""
        too_early = [
            (b, end)
            for b, row in enumerate(rows)
            if len(row.token_ids) < min(row.request.sampling.min_new_tokens, row.budget)
            for end in (*self._ends, *row.request.sampling.stop_token_ids)
        ]
        if too_early:
            # One write for all rows: one for each row takes as long as the forward pass of a small model.
            row_indices, end_ids = zip(*too_early, strict=True)
            logits_BV[list(row_indices), list(end_ids)] = -torch.inf
        temperature_B = torch.tensor([row.request.sampling.temperature for row in rows], device=logits_BV.device)
        greedy_B = temperature_B == 0
        logprobs_BV = torch.log_softmax(logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None], dim=-1)
        logprobs_BV = _truncated(logprobs_BV, [row.request.sampling for row in rows])
        uniform_B = torch.tensor([row.rng.random() for row in rows], dtype=torch.float64, device=logits_BV.device)
        # In float64: in float32 the sum over a large vocabulary misses 1 by more than a rare token's probability.
        cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
        target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        sampled_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
        token_B = torch.where(greedy_B, logits_BV.argmax(-1), sampled_B.clamp(max=logits_BV.shape[-1] - 1))
        logprob_B = logprobs_BV.gather(-1, token_B[:, None])[:, 0]
        for row, token, logprob in zip(rows, token_B.tolist(), logprob_B.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
        return token_B

    def _completion(self, token_ids: list[int], logprobs: list[float], reason: FinishReason) -> Completion:
        return completion_of(self._tokenizer, token_ids, logprobs, reason, self._version)

    def _reason(self, row: _Row) -> FinishReason | None:
        if row.token_ids and row.token_ids[-1] in (self._eos_id, *row.request.sampling.stop_token_ids):
            return "stop"
        return "length" if len(row.token_ids) >= row.budget else None


def _truncated(logprobs_BV: torch.Tensor, sampling: Sequence[SamplingParams]) -> torch.Tensor:
    """Of each row, the logprobs of what its sampling leaves: -inf for the other tokens, 1 in all for these."""
    if all(each.temperature == 0 or (each.top_p == 1 and each.top_k is None) for each in sampling):
        return logprobs_BV
    vocabulary, device = logprobs_BV.shape[-1], logprobs_BV.device
    kept_B1 = torch.tensor([[each.top_k or vocabulary] for each in sampling], device=device)
    top_p_B1 = torch.tensor([[each.top_p] for each in sampling], device=device, dtype=torch.float64)
    greedy_B1 = torch.tensor([[each.temperature == 0] for each in sampling], device=device)
    ordered_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    is_left_BV = torch.arange(vocabulary, device=device) < kept_B1
    share_BV = torch.where(is_left_BV, ordered_BV.double().exp(), 0.0)
    share_BV /= share_BV.sum(-1, keepdim=True)
    # The token that passes top_p is the last to stay.
    is_left_BV &= share_BV.cumsum(-1) - share_BV < top_p_B1
    is_kept_BV = torch.zeros_like(is_left_BV).scatter(-1, order_BV, is_left_BV) | greedy_B1
    return torch.log_softmax(logprobs_BV.masked_fill(~is_kept_BV, -torch.inf), dim=-1)
