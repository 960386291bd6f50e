"""Which keys of a training configuration may change while a run goes on: those that leave the training the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Where it runs, how long, how fast, and what is told of it. A section stands for all of its keys.
MAY_DIFFER = frozenset(
    {
        *("cluster", "logger", "checkpointing"),
        *("grpo.max_num_steps", "grpo.max_num_epochs", "grpo.max_steps_without_signal", "grpo.max_val_samples"),
        *("grpo.val_period", "grpo.val_at_start", "grpo.val_at_end", "grpo.val_num_generations_per_prompt"),
        *("grpo.stop_at_validation_metric", "grpo.stop_at_validation_threshold", "grpo.max_broken_fraction"),
        "grpo.dynamic_sampling_max_gen_batches",
        *(
            "policy.train_micro_batch_size",
            "policy.sequence_packing",
            "policy.logprob_chunk_size",
            "policy.allow_remote_code",
            "policy.dtensor_cfg.tensor_parallel_size",
            "policy.dtensor_cfg.hybrid_sharding",
            "policy.dtensor_cfg.activation_checkpointing",
            "policy.dtensor_cfg.cpu_offload",
            "policy.generation.max_batch_size",
            "policy.generation.max_restarts",
            "policy.generation.stall_timeout_seconds",
            "policy.generation.colocated",
            "policy.generation.weight_transfer",
            "policy.generation.vllm_cfg",
            "policy.generation.vllm_kwargs",
            "env.timeout_seconds",
            "env.math.num_workers",
            *("env.gym.url", "env.gym.agent_url", "env.gym.max_connections", "env.gym.max_retries"),
            *("env.gym.max_response_bytes", "env.gym.start_timeout_seconds"),
        ),
    }
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of each difference between two dumps that makes going on meaningless.

    A key that only one of them has is not known to the release that wrote the other, and says nothing.
    Example: [("grpo.seed", 1, 2)].
    """
    return list(_differences(old, new, ""))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name in new:
        key = f"{prefix}{name}"
        if name not in old or key in MAY_DIFFER:
            continue
        before, now = old[name], new[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{key}.")
        elif _plain(before) != _plain(now):
            yield key, before, now


def _plain(value: Any) -> Any:
    # A tuple of the schema reads back from YAML or JSON as a list.
    return list(value) if isinstance(value, tuple) else value
