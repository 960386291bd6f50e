"""Every key of a training configuration: its type, its default and what it means.

Names are NeMo RL's wherever it has the feature, so that its configurations and command lines read the same here. A
key that is not in this file is an error. Imports stay light: this file is read on the login node.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from slurmkit.config.section import Field, Section, model_validator

Count = Annotated[int, Field(ge=1)]
# A year: what waits must have a deadline, and timers overflow far above.
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Grpo(Section):
    num_prompts_per_step: Count = 32
    """Tasks that a step draws."""
    num_generations_per_prompt: Count = 16
    """Episodes per task: the size of a group."""
    max_num_epochs: Count = 1
    """Passes over the training tasks, at most."""
    max_num_steps: Count = 1_000_000
    """Steps, at most."""
    normalize_rewards: bool = True
    """Divide a group's advantages by its standard deviation (GRPO); false is Dr. GRPO."""
    use_leave_one_out_baseline: bool = True
    """Compare an episode with the mean (and spread) of the others of its group, not of all of it."""
    val_period: Annotated[int, Field(ge=0)] = 10
    """Validate after every so many steps; 0 is never."""
    val_at_start: bool = False
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    max_val_samples: Count | None = 256
    """Validation tasks, at most; null is all of them."""
    max_steps_without_signal: Count | None = 10
    """Give up after so many steps in a row in which no group had a right and a wrong answer; null never does."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 42
    """Everything random follows from it: the order of tasks, every sampled token, a model made from scratch."""

    @model_validator(mode="after")
    def _a_group_can_differ(self) -> Self:
        if self.num_generations_per_prompt == 1:
            raise ValueError(
                "num_generations_per_prompt is 1: an advantage compares the episodes of one task, so it needs 2 or more"
            )
        return self


class LossFn(Section):
    ratio_clip_min: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The importance ratio is clipped below 1 minus this."""
    ratio_clip_max: Annotated[float, Field(ge=0)] = 0.2
    """The importance ratio is clipped above 1 plus this; larger than ratio_clip_min is DAPO's clip-higher."""


class Checkpointing(Section):
    enabled: bool = True
    """Save checkpoints. Metrics and plots are always written."""
    checkpoint_dir: str = "results/grpo"
    """The run directory: step_N/, metrics.jsonl, plots/, wandb/, model/. On a disk that all nodes share."""
    metric_name: Literal["val:accuracy", "val:reward_mean", "train:accuracy", "train:reward_mean"] | None = (
        "val:accuracy"
    )
    """Which checkpoints are best; null keeps the latest keep_top_k. Computed before a save that needs it."""
    higher_is_better: bool = True
    """Whether a larger metric is better."""
    keep_top_k: Count | None = 3
    """Best checkpoints to keep beside the latest; null keeps all."""
    save_period: Count = 10
    """Save after every so many steps, and after the last."""
    resume: str = "auto"
    """Where to go on: auto is the run's newest good checkpoint, never starts anew, else a checkpoint's folder."""


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
    """Samples per forward and backward on one rank."""
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

    @model_validator(mode="after")
    def _completions_fit(self) -> Self:
        new, total = self.generation.max_new_tokens, self.max_total_sequence_length
        if new is not None and new >= total:
            raise ValueError(
                f"policy.generation.max_new_tokens {new} leaves no room for a prompt within "
                f"policy.max_total_sequence_length {total}: it must be at most {total - 1}"
            )
        return self


class DataSource(Section):
    data_path: str | None = None
    """A JSONL file, one task per line."""


class Data(Section):
    train: DataSource = DataSource()
    """Tasks to train on."""
    validation: DataSource = DataSource()
    """Tasks held out."""
    shuffle: bool = True
    """Draw tasks in an order that follows from grpo.seed, another one each epoch."""


class ArithmeticEnv(Section):
    num_terms: Annotated[int, Field(ge=2, le=4)] = 3
    """Digits to add up."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The part of all problems that is held out for validation."""
    demonstration_error: Annotated[int, Field(ge=0)] = 3
    """Demonstrations are off by up to this much either way, evenly: a model that copies them is right 1 in 2e+1."""


class MathEnv(Section):
    demonstration_error: Annotated[int, Field(ge=0)] = 3
    """As for arithmetic: demonstrated answers are off by up to this much."""


class Env(Section):
    name: Literal["arithmetic", "math"]
    """arithmetic makes its own problems; math reads rows {"question", "answer"} and compares numbers."""
    timeout_seconds: Seconds = 600.0
    """How long an environment may take over any one call; an episode that waits longer is counted as broken."""
    arithmetic: ArithmeticEnv = ArithmeticEnv()
    """Sums of digits."""
    math: MathEnv = MathEnv()
    """Word problems, GSM8K's format."""


class Wandb(Section):
    project: str = "slurmkit"
    """W&B project."""
    name: str | None = None
    """W&B run name; null lets W&B choose."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to the run directory only; `wandb sync` uploads it later."""


class Logger(Section):
    wandb_enabled: bool = False
    """Log to Weights & Biases as well; metrics.jsonl is always written."""
    wandb: Wandb = Wandb()
    """Where to."""


class Cluster(Section):
    num_nodes: Count = 1
    """Nodes to train on."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """Policy ranks and engines per node, one of each on every GPU; 0 is one of each on the CPU. Left
    out, a job's own number of GPUs per node, and 1 in `slurmkit run`."""
    placement_timeout_seconds: Seconds = 120.0
    """How long Ray may take to find room for all of them."""
    call_timeout_seconds: Seconds = 1800.0
    """How long any one call to a rank or an engine may take before the run gives up."""


class TrainConfig(Section):
    """The whole of a training run."""

    grpo: Grpo = Grpo()
    """The algorithm."""
    loss_fn: LossFn = LossFn()
    """The loss."""
    checkpointing: Checkpointing = Checkpointing()
    """What is saved, and where."""
    policy: Policy
    """The model that is trained."""
    data: Data = Data()
    """Tasks from files."""
    env: Env
    """Where tasks are posed and answers are judged."""
    logger: Logger = Logger()
    """Where metrics go besides metrics.jsonl."""
    cluster: Cluster = Cluster()
    """What the run takes of the machines."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        samples = self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt
        batch, ranks = self.policy.train_global_batch_size, self.num_ranks
        if samples % batch:
            raise ValueError(
                f"policy.train_global_batch_size {batch} must divide the {samples} samples of a step "
                f"(grpo.num_prompts_per_step {self.grpo.num_prompts_per_step} × grpo.num_generations_per_prompt "
                f"{self.grpo.num_generations_per_prompt})"
            )
        if batch < ranks:
            raise ValueError(
                f"policy.train_global_batch_size {batch} leaves some of the {ranks} policy ranks without a sample "
                "(cluster.num_nodes × cluster.gpus_per_node): it must be at least that many"
            )
        return self

    @model_validator(mode="after")
    def _tasks_come_from_somewhere(self) -> Self:
        paths = {"train": self.data.train.data_path, "validation": self.data.validation.data_path}
        for name, path in paths.items():
            if self.env.name == "math" and path is None:
                raise ValueError(f"env.name math reads its tasks: data.{name}.data_path must name a JSONL file")
            if self.env.name == "arithmetic" and path is not None:
                raise ValueError(f"env.name arithmetic makes its own tasks: data.{name}.data_path must be null")
        return self

    @property
    def ranks_per_node(self) -> int:
        """Policy ranks on each node; as many engines."""
        return max(1, self.cluster.gpus_per_node)

    @property
    def num_ranks(self) -> int:
        """Policy ranks in all."""
        return self.cluster.num_nodes * self.ranks_per_node
