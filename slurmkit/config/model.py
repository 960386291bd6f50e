"""The model's keys: what is trained, how it is sharded and updated, and how it samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from slurmkit.config.kinds import Count, Decay, Positive, Seconds, empty_if_null
from slurmkit.config.section import AfterValidator, BeforeValidator, Field, Section, model_validator


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


# Which arguments torch's schedulers take; true is one that must be given.
_SCHEDULERS = {
    "torch.optim.lr_scheduler.ConstantLR": {"factor": False, "total_iters": False},
    "torch.optim.lr_scheduler.LinearLR": {"start_factor": False, "end_factor": False, "total_iters": False},
    "torch.optim.lr_scheduler.CosineAnnealingLR": {"T_max": True, "eta_min": False},
    "torch.optim.lr_scheduler.PolynomialLR": {"total_iters": False, "power": False},
    "torch.optim.lr_scheduler.ExponentialLR": {"gamma": True},
}


class SchedulerPart(Section):
    """One scheduler with its arguments, or, after two or more of them, the milestones between them."""

    name: str | None = None
    """A class of torch.optim.lr_scheduler, such as torch.optim.lr_scheduler.LinearLR."""
    kwargs: dict[str, int | float] = {}
    """Its arguments; they count training steps."""
    milestones: tuple[Count, ...] | None = None
    """The training step after which each next scheduler takes over."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.name is None) == (self.milestones is None):
            raise ValueError("give either a scheduler's name (and kwargs) or milestones")
        if self.name is None:
            return self
        if self.name not in _SCHEDULERS:
            raise ValueError(f"name {self.name!r} is no scheduler that is known: it must be one of {list(_SCHEDULERS)}")
        arguments = _SCHEDULERS[self.name]
        if unknown := self.kwargs.keys() - arguments.keys():
            raise ValueError(f"kwargs {sorted(unknown)}: {self.name} takes {list(arguments)}")
        if absent := [name for name, needed in arguments.items() if needed and name not in self.kwargs]:
            raise ValueError(f"kwargs: {self.name} needs {', '.join(absent)}")
        return self


class LoraCfg(Section):
    """Train low-rank adapters beside a frozen model instead of the model."""

    enabled: bool = False
    """Use them."""
    dim: Count = 8
    """Their rank."""
    alpha: Positive = 32.0
    """What they add is scaled by alpha / dim."""
    dropout: Decay = 0.0
    """Share of their inputs that an update drops."""
    target_modules: tuple[str, ...] = ()
    """Ends of names of linear layers, such as q_proj; none is all of them but the head."""
    match_all_linear: bool | None = None
    """True adapts all of them but the head, whatever target_modules says; null does if target_modules is empty."""

    @model_validator(mode="after")
    def _some_are_adapted(self) -> Self:
        if self.match_all_linear is False and not self.target_modules:
            raise ValueError("match_all_linear false needs target_modules, such as [q_proj, v_proj]")
        return self

    @property
    def adapts_all_linear(self) -> bool:
        """True if adapters are on all linear layers but the head."""
        return self.match_all_linear or not self.target_modules


class DtensorCfg(Section):
    """How the model is spread over the policy ranks, and adapters."""

    tensor_parallel_size: Count = 1
    """Neighbouring ranks of a node that share each layer's matrices, by transformers' plan for the model."""
    hybrid_sharding: bool = False
    """Shard inside a node and replicate across nodes, instead of sharding over all ranks."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimiser in the CPU's memory between their uses."""
    lora_cfg: LoraCfg = LoraCfg()
    """Adapters."""

    @model_validator(mode="after")
    def _adapters_are_whole(self) -> Self:
        if self.lora_cfg.enabled and self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size {self.tensor_parallel_size} with lora_cfg.enabled: adapters are not split, so "
                "it must be 1"
            )
        return self


# What slurmkit itself tells vLLM, by vLLM's names, and the key that is to be used instead.
_VLLM_OWN = {
    "model": "policy.model_name",
    "dtype": "policy.precision",
    "max_model_len": "policy.max_total_sequence_length",
    "max_num_seqs": "policy.generation.max_batch_size",
    "trust_remote_code": "policy.allow_remote_code",
    "enforce_eager": "policy.generation.vllm_cfg.enforce_eager",
    "gpu_memory_utilization": "policy.generation.vllm_cfg.gpu_memory_utilization",
    "kv_cache_memory_bytes": "policy.generation.vllm_cfg.kv_cache_memory_bytes",
    "tensor_parallel_size": "policy.generation.vllm_cfg.tensor_parallel_size",
    "pipeline_parallel_size": "policy.generation.vllm_cfg.tensor_parallel_size",
    "data_parallel_size": "nothing: there are as many engines as there is room for",
    "enable_sleep_mode": "nothing: engines sleep where they share GPUs with the policy and take turns with it",
    "logprobs_mode": "nothing: training needs those of the distribution that was sampled from",
    "generation_config": "nothing: sampling is as policy.generation says",
    "worker_extension_cls": "nothing: it is how weights are loaded",
    "distributed_executor_backend": "nothing: Ray places engines",
    "skip_tokenizer_init": "nothing: engines are given tokens",
}


class ServingChatKwargs(Section):
    """How the HTTP server reads replies."""

    enable_auto_tools: bool = False
    """Return a reply's tool calls as such."""
    tool_parser: str | None = None
    """vLLM's name of their format, such as hermes or llama3_json."""

    @model_validator(mode="after")
    def _tools_have_a_format(self) -> Self:
        if self.enable_auto_tools and self.tool_parser is None:
            raise ValueError("enable_auto_tools true needs tool_parser, such as hermes or llama3_json")
        return self


def _unless_empty(text: str | None) -> str | None:
    return text or None  # $(find …) of a command line that found nothing


class VllmCfg(Section):
    """How vLLM runs, where policy.generation.backend is vllm."""

    tensor_parallel_size: Count = 1
    """GPUs of one node that an engine spans; on a CPU, processes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of a GPU's memory for an engine's weights and KV cache; the policy has the rest."""
    kv_cache_memory_bytes: Count | None = None
    """Bytes of an engine's KV cache; null is what gpu_memory_utilization leaves, and on a CPU 256 MiB."""
    enforce_eager: bool | None = None
    """Do without compiled graphs; null is true on a CPU, where they gain nothing, and false on a GPU."""
    expose_http_server: bool = False
    """Serve the policy over HTTP too, as OpenAI does, from every engine: serving/ of the run directory says where."""
    http_server_serving_chat_kwargs: Annotated[ServingChatKwargs, BeforeValidator(empty_if_null)] = ServingChatKwargs()
    """How it reads replies."""
    tool_parser_plugin: Annotated[str | None, AfterValidator(_unless_empty)] = None
    """Python file that registers the tool_parser of http_server_serving_chat_kwargs with vLLM; null if vLLM has it."""


ToolParser = Literal["hermes", "llama3_json", "nemotron"]


class ColocatedResources(Section):
    """What engines that are apart from the policy have to themselves."""

    num_nodes: Count | None = None
    """Of several nodes, so many; the policy has the others."""
    gpus_per_node: Count | None = None
    """Of a single node, so many of its GPUs; of several nodes always all."""


class Colocated(Section):
    """Whether engines share their nodes and GPUs with the policy."""

    enabled: bool = True
    """Each GPU is for both; false gives the engines nodes or GPUs of their own."""
    resources: ColocatedResources = ColocatedResources()
    """Which, where enabled is false."""

    @model_validator(mode="after")
    def _nothing_is_apart(self) -> Self:
        given = [f"{name} {value}" for name, value in self.resources.model_dump().items() if value is not None]
        if self.enabled and given:
            raise ValueError(f"resources {', '.join(given)} is for engines apart from the policy: set enabled to false")
        return self


class Generation(Section):
    backend: Literal["torch", "vllm"] = "torch"
    """The engine: torch is the embedded one, vllm the one for real models, which must be installed."""
    temperature: Positive = 1.0
    """Logits are divided by it, in the engine and in the loss; validation samples at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have at least this probability; 1 is all of them."""
    top_k: Count | None = None
    """Draw from so many likeliest tokens; null is all of them."""
    max_new_tokens: Count | None = None
    """Tokens of one completion, at most; null leaves what max_total_sequence_length allows."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of one completion, at least, where there is room: until then, none that would end it can be drawn."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Further tokens that end a completion, as the model's own end-of-sequence token does; each is kept."""
    max_batch_size: Count = 256
    """Completions that one engine samples together."""
    tool_parser: ToolParser | None = None
    """How the model writes tool calls: hermes (Qwen, Hermes), llama3_json or nemotron (Nemotron Nano v2); null looks
    into its chat template."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often each engine is started again where it dies; 0 ends the run."""
    stall_timeout_seconds: Seconds | None = None
    """An engine that has finished nothing for so long is taken for hung and started again, and a request that it has
    had for as long, while it finished others, is asked of another; null is cluster.call_timeout_seconds."""
    colocated: Colocated = Colocated()
    """Where engines are."""
    weight_transfer: Literal["auto", "shared", "broadcast", "ipc", "disk"] = "auto"
    """How engines get new weights: through memory of their node, a broadcast, memory of the GPU that they share with a
    policy rank, or a file in the run directory; auto is the fastest that there is."""
    vllm_cfg: VllmCfg = VllmCfg()
    """How vLLM runs."""
    vllm_kwargs: dict[str, Any] = {}
    """Further arguments of vLLM's AsyncEngineArgs."""

    @model_validator(mode="after")
    def _leaves_what_is_ours(self) -> Self:
        if own := [f"{name} (use {_VLLM_OWN[name]})" for name in self.vllm_kwargs if name in _VLLM_OWN]:
            raise ValueError(f"vllm_kwargs: slurmkit sets {', '.join(own)}")
        return self

    @model_validator(mode="after")
    def _vllm_alone_spans_devices(self) -> Self:
        if (size := self.vllm_cfg.tensor_parallel_size) > 1 and self.backend != "vllm":
            raise ValueError(f"vllm_cfg.tensor_parallel_size {size} needs backend vllm, and it is {self.backend}")
        return self

    @model_validator(mode="after")
    def _vllm_alone_serves(self) -> Self:
        if self.vllm_cfg.expose_http_server and self.backend != "vllm":
            raise ValueError(f"vllm_cfg.expose_http_server true needs backend vllm, and it is {self.backend}")
        return self


class SequencePacking(Section):
    train_mb_tokens: Count | None = None
    """Tokens of one micro-batch on one rank, at most; null is max_total_sequence_length × train_micro_batch_size."""


# Of transformers' apply_chat_template.
_TEMPLATE_ARGUMENTS = {
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "return_tensors", "return_dict",
}  # fmt: skip


class FromScratch(Section):
    """A small Qwen3-shaped model with a byte tokenizer, made when the run starts. For trying things out."""

    hidden_size: Count = 128
    """Width."""
    num_hidden_layers: Count = 2
    """Layers."""
    num_attention_heads: Count = 4
    """Query heads."""
    num_key_value_heads: Count = 4
    """Key and value heads."""
    head_dim: Count | None = None
    """Width of a head, an even number; null is hidden_size / num_attention_heads, where vLLM samples on a CPU at least
    32, as it has no kernel for less."""
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
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even")
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_attention_heads "
                f"{self.num_attention_heads}, or head_dim be given"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self


def _unless_default(text: str | None) -> str | None:
    return None if text == "default" else text


class TokenizerCfg(Section):
    """How conversations are written for the model. The tokenizer is the model's own."""

    chat_template: Annotated[str | None, AfterValidator(_unless_default)] = None
    """File with a Jinja template in place of the model's own, which checkpoints then have; null and "default" are the
    model's."""
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(empty_if_null)] = {}
    """Variables for the template. Example: {enable_thinking: false}."""

    @model_validator(mode="after")
    def _leaves_what_is_slurmkit_s(self) -> Self:
        for name in sorted(self.chat_template_kwargs.keys() & _TEMPLATE_ARGUMENTS):
            raise ValueError(f"chat_template_kwargs: slurmkit itself gives {name} to the template, leave it out")
        return self


class Policy(Section):
    model_name: str | None = None
    """A Hugging Face model: a folder or a name on the hub. Either this or from_scratch."""
    from_scratch: FromScratch | None = None
    """Make a small model instead."""
    allow_remote_code: tuple[str, ...] = ()
    """Names, as in model_name, of models that may run Python code of their own."""
    train_global_batch_size: Count = 512
    """Episodes per optimiser step."""
    train_micro_batch_size: Count = 4
    """Sequences of full length that one forward and backward on one rank has room for; shorter ones are more."""
    sequence_packing: SequencePacking = SequencePacking()
    """Sequences lie end to end in a micro-batch, without padding, and none sees another."""
    logprob_chunk_size: Count | None = None
    """Tokens whose logits exist at one time, forward and backward; null is as many as fill 32 MiB, on a GPU 1 GiB."""
    max_total_sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a conversation, prompt and replies together; a longer prompt is not trained on."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of policy and engines. Master weights, logprobs and the loss are float32 either way."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null leaves them."""
    dtensor_cfg: DtensorCfg = DtensorCfg()
    """How the model is spread over ranks."""
    optimizer: Optimizer = Optimizer()
    """How weights follow gradients."""
    scheduler: tuple[SchedulerPart, ...] | None = None
    """How the learning rate changes from step to step, as NeMo RL writes it: schedulers one after the other, then the
    milestones between them; null keeps it."""
    tokenizer: TokenizerCfg = TokenizerCfg()
    """How conversations are written."""
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
    def trusts_remote_code(self) -> bool:
        """Whether the model may bring code."""
        return self.model_name in self.allow_remote_code

    @model_validator(mode="after")
    def _schedulers_follow_each_other(self) -> Self:
        parts = self.scheduler or ()
        count = sum(part.name is not None for part in parts)
        milestones = [milestone for part in parts for milestone in part.milestones or ()]
        if parts and (not count or len(milestones) != count - 1 or milestones != sorted(set(milestones))):
            raise ValueError(
                f"policy.scheduler has {count} schedulers and the milestones {milestones}: it needs one milestone "
                "fewer than schedulers, in increasing order"
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
        least, most = self.generation.min_new_tokens, total - 1 if new is None else new
        if least > most:
            bound = "max_total_sequence_length" if new is None else "generation.max_new_tokens"
            raise ValueError(
                f"policy.generation.min_new_tokens {least} is more than policy.{bound} allows: it must be at most "
                f"{most}"
            )
        return self
