"""Any causal language model of transformers as what GRPO needs of one: logprobs and entropy of packed sequences.

Shapes: T positions of packed sequences, M of them whose logprobs are wanted, D width of the model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from slurmkit.errors import UserError
from slurmkit.grpo import packed_attention
from slurmkit.grpo.chunked_head import LogitsForm, chunked_logprobs
from slurmkit.grpo.metrics import say
from slurmkit.grpo.packed_attention import NotPackable, Packing
from slurmkit.grpo.rope import RopeSides, original_context

# Kinds of layers, by transformers' names, that look at no other sequence when attention does not.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}

# Lengths of the sequences on which a model is tried out when it is wrapped.
_TRIED_LENGTHS = (5, 1, 3)


class PolicyModel(torch.nn.Module):
    """Wraps a model that AutoModelForCausalLM loads; `model` is that one, for its weights and its configuration.

    It is what FSDP2's `fully_shard` takes as the root, over the layers: embeddings, final norm and output head are
    whole inside its forward. Wrap before sharding and with the weights in place: a few tokens are tried.

    Sequences lie end to end in one row where the model is attention alone and lets us replace it. Others (a state
    along the sequence such as Mamba's, remote code, scores that are changed on the way) take one sequence at a time,
    which is exact too, and slower. Sequences whose RoPE frequencies differ are not packed together. Dropout and other
    noise of training stay off: a ratio must compare the same function.
    """

    def __init__(self, model: Any, *, logprob_chunk_size: int | None = None, packs: bool | None = None) -> None:
        """UserError where the model's logits are not what this computes.

        `packs` is what the rank that has the weights found out; None is that rank.
        """
        super().__init__()
        self.model = model
        self._chunk_size = logprob_chunk_size
        # peft's wrapper has put its layers into this one.
        self._causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._text_config = self._causal_lm.config.get_text_config()
        self._form = _logits_form(self._text_config)
        self._sides = RopeSides(self._causal_lm, self._text_config)
        self.train()
        self.packs = self._try_out() if packs is None else packs
        if self.packs:
            self._causal_lm.set_attn_implementation(packed_attention.NAME)

    def train(self, mode: bool = True) -> PolicyModel:
        """Nothing inside learns that it is trained."""
        return super().train(False)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        lengths: tuple[int, ...],
        temperature: float,
        mask_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Natural log-probability of each token given those of its sequence before it, and the entropy in nats of
        the distribution it was drawn from, both at `temperature`.

        `position_ids_T` starts at 0 in each of the sequences of `lengths`. Where `mask_T` is given, only its positions
        are computed. Both results are [T], float32 (float64 for a model in float64), 0 at each sequence's first
        position and where the mask is false.
        """
        hidden_TD = self._hidden(token_ids_T, position_ids_T, lengths)
        wanted_T = position_ids_T > 0
        # A position's distribution comes from the hidden state before it.
        target_M = torch.nonzero(wanted_T if mask_T is None else wanted_T & mask_T)[:, 0]
        weight_VD = self._causal_lm.get_output_embeddings().weight
        if isinstance(weight_VD, DTensor):  # tensor parallel: every rank computes all logits
            weight_VD = weight_VD.full_tensor()
        form = LogitsForm(self._form.scale, self._form.softcap, temperature)
        results_M = chunked_logprobs(
            hidden_TD, weight_VD, target_M - 1, token_ids_T[target_M], form, chunk_size=self._chunk_size
        )
        logprobs_T, entropy_T = (
            torch.zeros(len(token_ids_T), dtype=result_M.dtype, device=result_M.device).index_put((target_M,), result_M)
            for result_M in results_M
        )
        return logprobs_T, entropy_T

    def _hidden(self, token_ids_T: torch.Tensor, position_ids_T: torch.Tensor, lengths: tuple[int, ...]) -> Any:
        if self.packs and not self._sides.depend_on_length:
            return self._pass(token_ids_T, position_ids_T, lengths)
        groups = self._sides.groups(lengths) if self.packs else [[index] for index in range(len(lengths))]
        # Sharded layers are gathered by all ranks together, so all must pass through them equally often.
        is_sharded = isinstance(self, FSDPModule)
        missing = _most_of_all_ranks(len(groups), token_ids_T.device) - len(groups) if is_sharded else 0
        ids, positions = (list(torch.split(x_T, list(lengths))) for x_T in (token_ids_T, position_ids_T))
        hidden: dict[int, torch.Tensor] = {}
        for group in groups:
            parts = tuple(lengths[index] for index in group)
            ids_T, positions_T = (torch.cat([each[index] for index in group]) for each in (ids, positions))
            hidden |= zip(group, self._pass(ids_T, positions_T, parts).split(list(parts)), strict=True)
        rest = [self._pass(token_ids_T[:1], position_ids_T[:1], (1,)) for _ in range(missing)]
        return torch.cat([*(hidden[index] for index in range(len(lengths))), *rest])

    def _pass(self, token_ids_T: torch.Tensor, position_ids_T: torch.Tensor, lengths: tuple[int, ...]) -> Any:
        """Return the hidden states of sequences that go through the layers together."""
        self._sides.forget()
        packed = {}
        if self.packs:
            packed = {"position_ids": position_ids_T[None], "packing": Packing(lengths, token_ids_T.device)}
        return self._decoder(input_ids=token_ids_T[None], use_cache=False, **packed).last_hidden_state[0]

    @property
    def _decoder(self) -> Any:
        decoder = self._causal_lm.get_decoder()
        return self._causal_lm.model if decoder is self._causal_lm else decoder

    @torch.no_grad()
    def _try_out(self) -> bool:
        """Return True if packed sequences get the logprobs that the model gives each alone; UserError if none do."""
        name = type(self._causal_lm).__name__
        head = self._causal_lm.get_output_embeddings()
        if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
            raise UserError(
                f"policy.model_name: {name} has {head} as its output head; slurmkit trains models whose head is a "
                "linear layer without bias and without adapters"
            )
        device, vocabulary = head.weight.device, len(head.weight)
        positions_T = torch.cat([torch.arange(length, device=device) for length in _TRIED_LENGTHS])
        ids_T = (torch.arange(sum(_TRIED_LENGTHS), device=device) * 7919 + 1) % vocabulary
        expected_T = torch.cat([self._expected(ids) for ids in torch.split(ids_T, list(_TRIED_LENGTHS))])
        own = self._causal_lm.config._attn_implementation
        reason = _why_not_packed(self._causal_lm)
        if reason is None:
            self._causal_lm.set_attn_implementation(packed_attention.NAME)
            self.packs = True
            try:
                found_T, _ = self(ids_T, positions_T, _TRIED_LENGTHS, 1.0)
                if not _alike(found_T, expected_T, head.weight.dtype):
                    reason = "packed sequences differ from single ones"
                elif not self._sides.depend_on_length and self._differs_beside_a_long_one(ids_T):
                    reason = "a sequence differs beside one beyond the model's original context"
                else:
                    return True
            except NotPackable as error:
                reason = str(error)
            self._causal_lm.set_attn_implementation(own)
        self.packs = False
        found_T, _ = self(ids_T, positions_T, _TRIED_LENGTHS, 1.0)
        if not _alike(found_T, expected_T, head.weight.dtype):
            raise UserError(
                f"policy.model_name: the logits of {name} are not its output head times its hidden states: logprobs "
                f"differ by {float((found_T - expected_T).abs().max()):.2g}. slurmkit knows final_logit_softcapping, "
                "logit_scale and logits_scaling of a model's configuration, and nothing else between the two"
            )
        say(f"{name} takes one sequence at a time, as {reason}")
        return False

    def _differs_beside_a_long_one(self, ids_T: torch.Tensor) -> bool:
        """Return whether a packed sequence changes when another ends beyond the model's original context."""
        context = original_context(self._text_config)
        if context is None:
            return False
        positions_T = torch.arange(len(ids_T), device=ids_T.device)
        twice_T, lengths = torch.cat([ids_T, ids_T]), (len(ids_T), len(ids_T))
        # The second sequence stands for the last tokens of a long one. The first is compared with itself in a call of
        # the same shape: in another one, kernels alone may change a large model's logprobs by more than the tolerance.
        short_T, long_T = (
            self(twice_T, torch.cat([positions_T, positions_T + start]), lengths, 1.0)[0][: len(ids_T)]
            for start in (0, context - 1)
        )
        return not _alike(long_T, short_T, self._causal_lm.get_output_embeddings().weight.dtype)

    def _expected(self, ids_T: torch.Tensor) -> torch.Tensor:
        self._sides.forget()
        logits_TV = self._causal_lm(input_ids=ids_T[None], use_cache=False).logits[0].float()
        logprobs_TV = logits_TV.log_softmax(-1)[:-1]
        return torch.nn.functional.pad(logprobs_TV.gather(-1, ids_T[1:, None])[:, 0], (1, 0))


def _logits_form(config: Any) -> LogitsForm:
    """Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 caps."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitsForm(scale, getattr(config, "final_logit_softcapping", None))


def _why_not_packed(model: Any) -> str | None:
    """Return what in the model's class forbids packing, None if nothing does."""
    if not (model._supports_attention_backend and model._supports_flash_attn):
        return "its attention cannot be replaced"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
    if model._is_stateful or kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds)) or 'that keeps a state'}"
    return None


def _alike(found_T: torch.Tensor, expected_T: torch.Tensor, kind: torch.dtype) -> bool:
    # A wrong scale or a sequence that sees another is off by more; other kernels are not.
    tolerance = 3e-2 if kind in (torch.bfloat16, torch.float16) else 1e-4
    return torch.allclose(found_T.float(), expected_T, rtol=tolerance, atol=tolerance)


def _most_of_all_ranks(count: int, device: torch.device) -> int:
    counts = torch.tensor(count, device=device)
    distributed.all_reduce(counts, distributed.ReduceOp.MAX)
    return int(counts)
