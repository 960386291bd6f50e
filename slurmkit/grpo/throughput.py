"""What a step makes of the machines: tokens per second by NeMo RL's definitions, MFU by prime-rl's, memory.

T: tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from slurmkit.config.schema import TrainConfig
from slurmkit.grpo.batch import OptimizerStep
from slurmkit.rollout.collect import Group

# Dense bfloat16 FLOP/s, without sparsity, as NVIDIA's data sheets have them; the first whose name fits counts.
_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10": 125e12,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's arithmetic follows from. `parameters` are those that a token is multiplied with, the output
    layer's included and the embedding's, which is looked up, not; of a mixture's experts those that a token meets."""

    parameters: int
    layers: int
    hidden_size: int

    def flops(self, lengths: Iterable[int]) -> float:
        """Of a forward and a backward over whole sequences: (6 · parameters + 12 · layers · hidden_size · T) · T each
        (prime-rl, trainer/perf.py, which takes heads × their size for the hidden size, and nothing for masked)."""
        attention = 12 * self.layers * self.hidden_size
        return float(sum((6 * self.parameters + attention * length) * length for length in lengths))


@dataclass(frozen=True, slots=True)
class Description:
    """What rank 0 says of the model and the device."""

    shape: Shape
    device: str


def shape_of(model: Any) -> Shape:
    """The shape of a transformers causal LM, sharded or not."""
    config = model.config.get_text_config()
    experts = next((getattr(config, name) for name in ("num_local_experts", "num_experts") if hasattr(config, name)), 0)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = float(output.numel() if output is embedding else 0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter is not embedding:
            of_experts = parameter.ndim == 3 and parameter.shape[0] == experts
            parameters += parameter.numel() * (config.num_experts_per_tok / experts if of_experts else 1)
    kinds = getattr(config, "layers_block_type", None)  # of models that are not all attention
    return Shape(
        parameters=round(parameters),
        layers=config.num_hidden_layers if kinds is None else sum("attention" in kind for kind in kinds),
        hidden_size=config.hidden_size,
    )


def peak_flops(device: str) -> float | None:
    """Of a GPU by its name, such as `NVIDIA H100 80GB HBM3`; None of one that is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device), None)


class Gauge:
    """Reads the figures of one step after the other."""

    def __init__(self, config: TrainConfig, description: Description) -> None:
        self._gpus = config.num_devices
        self._sampling_phase = "step" if config.grpo.max_age else "rollout"
        self._shape = description.shape
        told = config.cluster.peak_tflops_per_gpu
        self._peak = told * 1e12 if told is not None else peak_flops(description.device)

    def read(
        self,
        groups: Sequence[Group],
        updates: Sequence[OptimizerStep],
        metrics: Mapping[str, float],
        *,
        engines_busy: float,
    ) -> dict[str, float]:
        """Lengths of what was generated and what that makes per second and GPU.

        `metrics` has the phases' seconds; `engines_busy` are those of the step in which an engine had something to do.
        """
        episodes = [episode for group in groups for episode in group.episodes]
        if not episodes:
            return {}
        prompts = [len(episode.prompt_ids) for episode in episodes]
        completions = [episode.num_sampled_tokens for episode in episodes]
        totals = [length for episode in episodes for length in episode.sequence_lengths]
        found: dict[str, float] = {"train:total_tokens": float(sum(totals))}
        for name, lengths in (("prompt", prompts), ("completion", completions), ("sequence", totals)):
            found[f"train:{name}_tokens_mean"] = fmean(lengths)
            found[f"train:{name}_tokens_max"] = float(max(lengths))

        def rate(amount: float, *phases: str) -> float:
            return amount / sum(metrics.get(f"time:{phase}", 0.0) for phase in phases) / self._gpus

        found["perf:samples_per_sec_per_gpu"] = rate(len(episodes), "step")
        found["perf:tokens_per_sec_per_gpu"] = rate(sum(totals), "step")
        found["perf:generation_tokens_per_sec_per_gpu"] = rate(sum(totals), self._sampling_phase)
        found["perf:trainer_idle"] = metrics["time:rollout"] / metrics["time:step"]
        found["perf:engines_idle"] = max(0.0, 1 - engines_busy / metrics["time:step"])
        if "time:logprobs" in metrics:
            found["perf:logprobs_tokens_per_sec_per_gpu"] = rate(sum(totals), "logprobs")
        if updates:
            trained = [length for step in updates for rank in step.ranks for each in rank for length in each.lengths]
            found["perf:policy_training_tokens_per_sec_per_gpu"] = rate(sum(trained), "update")
            found["perf:training_worker_group_tokens_per_sec_per_gpu"] = rate(sum(trained), "update", "logprobs")
            flops = rate(self._shape.flops(trained), "update")
            found["perf:train_tflops_per_gpu"] = flops / 1e12
            if self._peak is not None:
                found["perf:mfu"] = flops / self._peak
        return found
