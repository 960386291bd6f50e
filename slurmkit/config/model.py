"""The model's keys: what is trained, how it is sharded and updated, and how it samples."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from slurmkit.config.kinds import Count, Decay, Positive
from slurmkit.config.section import Field, Section, model_validator


class OptimizerKwargs(Section):
    lr: Positive = 5e-6
    """Learning rate."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""


class Optimizer(Section):
    name: Literal["torch.optim.AdamW"] = "torch.optim.AdamW"
    """The optimiser's class."""
    kwargs: OptimizerKwargs = OptimizerKwargs()
    """Its arguments."""


class Generation(Section):
    backend: Literal["torch"] = "torch"
    """The engine: torch is the embedded one."""
    temperature: Positive = 1.0
    """Logits are divided by it, in the engine and in the loss; validation samples at the same one."""
    max_new_tokens: Count | None = None
    """Tokens of one completion, at most; null leaves what max_total_sequence_length allows."""
    max_batch_size: Count = 256
    """Completions that one torch engine samples together."""


class SequencePacking(Section):
    train_mb_tokens: Count | None = None
    """Tokens of one micro-batch on one rank, at most; null is max_total_sequence_length × train_micro_batch_size."""


class FromScratch(Section):
    """A small Qwen3-shaped model with a byte tokenizer, made when the run starts. For trying things out."""

    hidden_size: Count = 128
    """Width."""
    num_hidden_layers: Count = 2
    """Layers."""
    num_attention_heads: Count = 4
    """Query heads; each is hidden_size / num_attention_heads wide."""
    num_key_value_heads: Count = 4
    """Key and value heads."""
    intermediate_size: Count = 384
    """Width inside the feed-forward blocks."""
    supervised_steps: Annotated[int, Field(ge=0)] = 300
    """Steps of supervised training on the environment's demonstrations, so that some first answers are right."""
    supervised_batch_size: Count = 64
    """Demonstrations per supervised step."""
    supervised_lr: Positive = 2e-3
    """Peak learning rate of the supervised steps."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self


class Policy(Section):
    model_name: str | None = None
    """A Hugging Face model: a folder or a name on the hub. Either this or from_scratch."""
    from_scratch: FromScratch | None = None
    """Make a small model instead."""
    train_global_batch_size: Count = 512
    """Samples per optimiser step."""
    train_micro_batch_size: Count = 4
    """Sequences of full length that one forward and backward on one rank has room for; shorter ones are more."""
    sequence_packing: SequencePacking = SequencePacking()
    """Sequences lie end to end in a micro-batch, without padding, and none sees another."""
    logprob_chunk_size: Count | None = None
    """Tokens whose logits exist at one time, forward and backward; null is as many as fill 32 MiB, on a GPU 1 GiB."""
    max_total_sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of prompt and completion together; a longer prompt is not trained on."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of policy and engines. Master weights, logprobs and the loss are float32 either way."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    optimizer: Optimizer = Optimizer()
    """How weights follow gradients."""
    generation: Generation = Generation()
    """How completions are sampled."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model_name is None) == (self.from_scratch is None):
            raise ValueError(
                "give exactly one of policy.model_name (a folder or a hub name) and policy.from_scratch (sizes)"
            )
        return self

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one micro-batch on one rank, at most."""
        return self.sequence_packing.train_mb_tokens or self.max_total_sequence_length * self.train_micro_batch_size

    @model_validator(mode="after")
    def _a_sequence_fits_a_micro_batch(self) -> Self:
        if self.micro_batch_tokens < self.max_total_sequence_length:
            raise ValueError(
                f"policy.sequence_packing.train_mb_tokens {self.micro_batch_tokens} has no room for one sequence of "
                f"policy.max_total_sequence_length {self.max_total_sequence_length}: it must be at least that many"
            )
        return self

    @model_validator(mode="after")
    def _completions_fit(self) -> Self:
        new, total = self.generation.max_new_tokens, self.max_total_sequence_length
        if new is not None and new >= total:
            raise ValueError(
                f"policy.generation.max_new_tokens {new} leaves no room for a prompt within "
                f"policy.max_total_sequence_length {total}: it must be at most {total - 1}"
            )
        return self
