"""A whole training configuration, and what its parts ask of each other.

Names are NeMo RL's wherever it has the feature, so that its configurations and command lines read the same here. A
key that has no class here or in the files beside it is an error. Imports stay light: these are read on the login node.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from slurmkit.config.algorithm import Grpo, LossFn
from slurmkit.config.data import Data, Env
from slurmkit.config.kinds import Count, Positive, Seconds
from slurmkit.config.metrics import computed
from slurmkit.config.model import Policy
from slurmkit.config.section import AfterValidator, Field, Section, model_validator
from slurmkit.config.validate import nearest


def _duration(text: str) -> str:
    if re.fullmatch(r"\d{2,}:([01]\d|2[0-3]):[0-5]\d:[0-5]\d", text) is None:
        raise ValueError(f"should be DD:HH:MM:SS, such as 00:03:45:00 for three and three quarter hours, not {text!r}")
    return text


class Checkpointing(Section):
    enabled: bool = True
    """Save checkpoints. Metrics and plots are always written."""
    checkpoint_dir: str = "results/grpo"
    """The run directory: step_N/, model/, and the logs unless logger.log_dir is set. On a disk that all nodes share."""
    metric_name: str | None = "val:accuracy"
    """Which checkpoints are best: any metric of docs/metrics.md that the run computes, and that is computed before a
    save; null keeps the latest keep_top_k."""
    higher_is_better: bool = True
    """Whether a larger metric is better."""
    keep_top_k: Count | None = 3
    """Best checkpoints to keep beside the latest; null keeps all."""
    save_period: Count = 10
    """Save after every so many steps, and after the last."""
    checkpoint_must_save_by: Annotated[str, AfterValidator(_duration)] | None = None
    """DD:HH:MM:SS since the trainer started: once, save after the last step that ends before, and go on."""
    resume: str = "auto"
    """Where to go on: auto is the run's newest good checkpoint, never starts anew, else a checkpoint's folder."""

    @property
    def must_save_by_seconds(self) -> float | None:
        """checkpoint_must_save_by in seconds."""
        if self.checkpoint_must_save_by is None:
            return None
        days, hours, minutes, seconds = map(int, self.checkpoint_must_save_by.split(":"))
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _tag(text: str) -> str:
    if not 1 <= len(text) <= 64:
        raise ValueError(f"a tag of W&B has 1 to 64 characters, this one has {len(text)}")
    return text


class Wandb(Section):
    project: str = "slurmkit"
    """W&B project."""
    name: str | None = None
    """W&B run name; null lets W&B choose."""
    entity: str | None = None
    """W&B team or user; null is the key's own."""
    tags: tuple[Annotated[str, AfterValidator(_tag)], ...] = ()
    """Words to find the run by. Those of a later attempt take the place of the earlier ones'."""
    group: str | None = None
    """Runs that belong together, such as the seeds of one experiment."""
    notes: str | None = None
    """A sentence or two on what the run is for."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to the run directory only; `slurmkit sync` uploads it later."""


class Logger(Section):
    log_dir: str | None = None
    """Folder of metrics.jsonl, plots/, samples/, validation/, wandb/ and tensorboard/, one for each run; the run
    directory then has links to them. null is the run directory itself."""
    wandb_enabled: bool = False
    """Log to Weights & Biases as well; metrics.jsonl is always written."""
    wandb: Wandb = Wandb()
    """Where to."""
    num_val_transcripts: Annotated[int, Field(ge=0)] = 16
    """Validation tasks whose conversations are kept in validation/step_N.jsonl of the run directory."""
    num_train_samples: Annotated[int, Field(ge=0)] = 4
    """Training episodes that are kept token by token in samples/step_N.jsonl, of each step that validates or saves."""
    tensorboard_enabled: bool = False
    """Log to TensorBoard as well, in tensorboard/ of the run directory."""


class Cluster(Section):
    num_nodes: Count = 1
    """Nodes to train on."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """GPUs per node, each with a policy rank and an engine (or with one of the two, see policy.generation.colocated);
    0 is one of each on the CPU. Left out, a job's own number of GPUs per node, and 1 in `slurmkit run`."""
    placement_timeout_seconds: Seconds = 120.0
    """How long Ray may take to find room for all of them."""
    peak_tflops_per_gpu: Positive | None = None
    """What a GPU can do, in dense TFLOP/s of bfloat16, for perf:mfu; null takes it from the GPU's name, if known."""
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
    def _there_is_room_for_both(self) -> Self:
        colocated, nodes, gpus = self.policy.generation.colocated, self.cluster.num_nodes, self.cluster.gpus_per_node
        key, own = "policy.generation.colocated", colocated.resources
        has = f"cluster.num_nodes {nodes} with cluster.gpus_per_node {gpus}"
        if colocated.enabled:
            pass
        elif nodes > 1:
            if own.num_nodes is None or own.num_nodes >= nodes:
                raise ValueError(
                    f"{key}.enabled false needs {key}.resources.num_nodes, which is "
                    f"{'null' if own.num_nodes is None else own.num_nodes}: of {has} it must leave the policy at least "
                    f"one, so 1 to {nodes - 1}"
                )
            if own.gpus_per_node not in (None, gpus):
                raise ValueError(
                    f"{key}.resources.gpus_per_node {own.gpus_per_node}: of {has} the engines have whole nodes, so it "
                    f"must be null or {gpus}"
                )
        elif gpus < 2:
            raise ValueError(f"{key}.enabled false: {has} cannot be shared out between policy and engines: set it true")
        elif own.gpus_per_node is None or own.gpus_per_node >= gpus:
            raise ValueError(
                f"{key}.enabled false needs {key}.resources.gpus_per_node, which is "
                f"{'null' if own.gpus_per_node is None else own.gpus_per_node}: of {has} it must leave the policy at "
                f"least one, so 1 to {gpus - 1}"
            )
        elif own.num_nodes not in (None, 1):
            raise ValueError(f"{key}.resources.num_nodes {own.num_nodes}: of {has} it must be null or 1")
        size = self.policy.generation.vllm_cfg.tensor_parallel_size
        if gpus and self.engine_gpus_per_node % size:
            raise ValueError(
                f"policy.generation.vllm_cfg.tensor_parallel_size {size} must divide the {self.engine_gpus_per_node} "
                "GPUs of a node that engines have (cluster.gpus_per_node, policy.generation.colocated.resources), as "
                "an engine lies inside a node"
            )
        return self

    @model_validator(mode="after")
    def _weights_have_a_way(self) -> Self:
        generation, gpus = self.policy.generation, self.cluster.gpus_per_node
        way, is_shared = generation.weight_transfer, generation.colocated.enabled
        problem = ""
        if way == "shared" and self.cluster.num_nodes > 1:
            problem = f"is for engines on the policy's own node, of cluster.num_nodes {self.cluster.num_nodes}"
        elif way == "broadcast" and gpus and is_shared:
            problem = "is between GPUs, and policy.generation.colocated.enabled true has engines on the policy's own"
        elif way == "ipc" and not (gpus and is_shared):
            problem = (
                f"needs GPUs that policy and engines share, and cluster.gpus_per_node is {gpus}, "
                f"policy.generation.colocated.enabled {str(is_shared).lower()}"
            )
        elif way == "ipc" and self.policy.dtensor_cfg.lora_cfg.enabled:
            problem = "is from GPU to GPU, and policy.dtensor_cfg.lora_cfg.enabled true merges adapters on the CPU"
        if problem:
            raise ValueError(f"policy.generation.weight_transfer {way} {problem}: use auto or disk")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        samples = self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt
        batch, ranks = self.policy.train_global_batch_size, self.num_data_parallel_ranks
        if samples % batch:
            raise ValueError(
                f"policy.train_global_batch_size {batch} must divide the {samples} samples of a step "
                f"(grpo.num_prompts_per_step {self.grpo.num_prompts_per_step} × grpo.num_generations_per_prompt "
                f"{self.grpo.num_generations_per_prompt})"
            )
        if batch < ranks:
            raise ValueError(
                f"policy.train_global_batch_size {batch} leaves some of the {ranks} data-parallel ranks without a "
                "sample (cluster.num_nodes × cluster.gpus_per_node / policy.dtensor_cfg.tensor_parallel_size"
                + ("" if self.policy.generation.colocated.enabled else ", without what the engines have")
                + "): it must be at least that many"
            )
        return self

    @model_validator(mode="after")
    def _tensor_parallel_ranks_are_neighbours(self) -> Self:
        size = self.policy.dtensor_cfg.tensor_parallel_size
        if self.ranks_per_node % size:
            raise ValueError(
                f"policy.dtensor_cfg.tensor_parallel_size {size} must divide the {self.ranks_per_node} policy ranks "
                "of a node (cluster.gpus_per_node"
                + ("" if self.policy.generation.colocated.enabled else " without the engines' GPUs")
                + "), as matrices are shared inside a node only"
            )
        return self

    @model_validator(mode="after")
    def _the_loss_fits(self) -> Self:
        samples = self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt
        batch = self.policy.train_global_batch_size
        if self.loss_fn.force_on_policy_ratio and batch != samples:
            raise ValueError(
                f"loss_fn.force_on_policy_ratio true takes the policy for the one that sampled, and "
                f"policy.train_global_batch_size {batch} makes {samples // batch} updates of a step's samples: set it "
                f"to {samples}"
            )
        generation = self.policy.generation
        truncated = f"policy.generation.top_p {generation.top_p:g}" if generation.top_p < 1 else ""
        for name in ("top_k", "min_new_tokens"):
            value = getattr(generation, name)
            truncated = truncated or (f"policy.generation.{name} {value}" if value else "")
        if truncated and self.loss_fn.use_importance_sampling_correction:
            raise ValueError(
                f"{truncated} never draws some tokens, so that no weight corrects for what is drawn, as "
                "loss_fn.use_importance_sampling_correction true asks for: leave one of them out"
            )
        if truncated and not (self.loss_fn.force_on_policy_ratio or self.loss_fn.disable_ppo_ratio):
            raise ValueError(
                f"{truncated} makes the sampled tokens likelier than in the policy, and every ratio to it too small: "
                "leave it out, or set loss_fn.force_on_policy_ratio or loss_fn.disable_ppo_ratio to true"
            )
        if self.loss_fn.use_kl_in_reward and self.grpo.adv_estimator.name == "maxrl":
            raise ValueError(
                "grpo.adv_estimator.name maxrl divides by a mean reward that must be positive, and "
                "loss_fn.use_kl_in_reward true lowers the rewards: set it to false"
            )
        return self

    @model_validator(mode="after")
    def _what_is_sampled_early_is_corrected_for(self) -> Self:
        asynchronous, backend = self.grpo.async_grpo, self.policy.generation.backend
        if self.grpo.max_age and not self.loss_fn.needs_prev_logprobs:
            off, right = "use_importance_sampling_correction false", "true"
            if self.loss_fn.force_on_policy_ratio:
                off, right = "force_on_policy_ratio true", "false"
            raise ValueError(
                f"grpo.async_grpo.enabled true with max_trajectory_age_steps {self.grpo.max_age} trains on tokens of "
                f"older weights, for which loss_fn.{off} does not correct: set it to {right}"
            )
        if asynchronous.enabled and asynchronous.in_flight_weight_updates and backend != "vllm":
            raise ValueError(
                f"grpo.async_grpo.in_flight_weight_updates true needs policy.generation.backend vllm, and it is "
                f"{backend}, which finishes what it samples first: set it to false"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_are_judged_by_what_there_is(self) -> Self:
        name = self.checkpointing.metric_name
        if name is not None and name not in (there := computed(self)):
            near = nearest(name, there)
            raise ValueError(
                f"checkpointing.metric_name {name} is not computed by this run"
                + (f"; the nearest that is is {near}" if near else ": docs/metrics.md lists what is")
            )
        return self

    @model_validator(mode="after")
    def _tasks_come_from_somewhere(self) -> Self:
        held_out = any(source.split_validation_size for source in self.data.train_sources.values())
        for key, source in self.data.sources.items():
            if self.env.name == "arithmetic" and source.data_path is not None:
                raise ValueError(f"env.name arithmetic makes its own tasks: {key}.data_path must be null")
            is_needed = key != "data.validation" or (self.validates and not held_out)
            if self.env.name != "arithmetic" and source.data_path is None and is_needed:
                also = "a CSV file of WorkBench's tasks, " if self.env.name == "workplace" else ""
                raise ValueError(
                    f"env.name {self.env.name} reads its tasks: {key}.data_path must name a JSONL file, {also}a "
                    "Parquet file, a folder of the datasets library or, with split, a data set on the hub"
                    + (", or data.train.split_validation_size be above 0" if key == "data.validation" else "")
                )
        return self

    @model_validator(mode="after")
    def _an_agent_reaches_the_policy(self) -> Self:
        if self.env.name != "gym" or self.env.gym.agent_url is None:
            return self
        generation = self.policy.generation
        if generation.backend != "vllm" or not generation.vllm_cfg.expose_http_server:
            raise ValueError(
                "env.gym.agent_url names an agent that asks the policy over HTTP: set policy.generation.backend to "
                "vllm and policy.generation.vllm_cfg.expose_http_server to true"
            )
        if generation.top_k is not None:
            raise ValueError(
                f"policy.generation.top_k {generation.top_k} cannot be told to an agent (env.gym.agent_url), whose "
                "requests have temperature and top_p: leave it out"
            )
        return self

    @property
    def validates(self) -> bool:
        """Whether there is any validation in the run."""
        judged = self.checkpointing.enabled and (self.checkpointing.metric_name or "").startswith("val:")
        return judged or self.grpo.val_period > 0 or self.grpo.val_at_start or self.grpo.val_at_end

    def weight_way(self, *, is_beside: bool) -> Literal["shared", "broadcast", "ipc", "disk"]:
        """How an engine gets weights, which may be beside the policy's first rank, on its node."""
        generation = self.policy.generation
        if generation.weight_transfer != "auto":
            return generation.weight_transfer
        if not (self.cluster.gpus_per_node and generation.colocated.enabled):
            return "broadcast" if self.cluster.gpus_per_node or not is_beside else "shared"
        if self.policy.dtensor_cfg.lora_cfg.enabled:  # merged on the first rank, in the CPU's memory
            return "shared" if is_beside else "disk"
        return "ipc"

    @property
    def takes_turns(self) -> bool:
        """Whether engines sleep while the policy trains on their GPUs, and the policy rests while they sample."""
        generation = self.policy.generation
        is_shared = generation.colocated.enabled and self.cluster.gpus_per_node > 0
        return is_shared and generation.backend == "vllm" and not self.grpo.max_age

    @property
    def num_policy_nodes(self) -> int:
        """Nodes with policy ranks, the first ones."""
        own = self.policy.generation.colocated.resources.num_nodes or 0
        return self.cluster.num_nodes - (own if self.cluster.num_nodes > 1 else 0)

    @property
    def num_engine_nodes(self) -> int:
        """Nodes with engines, the last ones."""
        return self.policy.generation.colocated.resources.num_nodes or self.cluster.num_nodes

    @property
    def engine_gpus_per_node(self) -> int:
        """GPUs that engines use on each of their nodes."""
        return self.policy.generation.colocated.resources.gpus_per_node or self.cluster.gpus_per_node

    @property
    def ranks_per_node(self) -> int:
        """Policy ranks on each of their nodes."""
        own = self.policy.generation.colocated.resources.gpus_per_node or 0
        return max(1, self.cluster.gpus_per_node - (own if self.cluster.num_nodes == 1 else 0))

    @property
    def num_ranks(self) -> int:
        """Policy ranks in all."""
        return self.num_policy_nodes * self.ranks_per_node

    @property
    def num_devices(self) -> int:
        """GPUs in all, or nodes where there are none."""
        return self.cluster.num_nodes * max(1, self.cluster.gpus_per_node)

    @property
    def needs_starting_model(self) -> bool:
        """Whether the model as it was before training is needed beside the one that is trained."""
        return self.policy.dtensor_cfg.lora_cfg.enabled or self.loss_fn.reference_policy_kl_penalty > 0

    @property
    def num_data_parallel_ranks(self) -> int:
        """Parts that a batch is cut into: tensor-parallel ranks share theirs."""
        return self.num_ranks // self.policy.dtensor_cfg.tensor_parallel_size
