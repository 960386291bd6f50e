"""The names of what a training run computes in every step that has an update, so that a checkpoint is judged by one of
them. docs/metrics.md says what each means, and names those, too, that only some steps have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurmkit.config.schema import TrainConfig

_CONVERSATION = ("turns_mean", "tool_calls_mean", "malformed_tool_calls", "max_turns_reached", "timed_out")
_ROLLOUT = (
    *("reward_mean", "reward_std", "accuracy", "truncated_fraction", "groups_with_signal"),
    *("broken_episodes", "prompts_too_long"),
    *_CONVERSATION,
    *(f"{part}_tokens_{figure}" for part in ("prompt", "completion", "sequence") for figure in ("mean", "max")),
    *("total_tokens", "tokens_without_logprob", "gen_batches", "discarded_groups", "age_mean", "age_max"),
)
_UPDATE = (
    *("loss", "policy_loss", "grad_norm", "lr", "entropy", "approx_kl", "trained_tokens", "peak_memory_gib"),
    *("ratio_mean", "ratio_min", "ratio_max", "clip_fraction", "clip_fraction_low", "clip_fraction_high"),
    *("token_mult_prob_error", "gen_kl_error", "sampling_importance_ratio"),
)
_VALIDATION = (
    *("accuracy", "reward_mean", "reward_std", "completion_tokens_mean", "truncated_fraction"),
    *("broken_episodes", "prompts_too_long"),
    *_CONVERSATION,
)
_MATH = ("verifier_failures",)
_PHASES = ("rollout", "update", "weights", "other", "step")
_RATES = (
    *("samples_per_sec_per_gpu", "tokens_per_sec_per_gpu", "generation_tokens_per_sec_per_gpu"),
    *("policy_training_tokens_per_sec_per_gpu", "training_worker_group_tokens_per_sec_per_gpu"),
    *("train_tflops_per_gpu", "trainer_idle", "engines_idle"),
)


def computed(config: TrainConfig) -> tuple[str, ...]:
    """The names of all metrics that a step of this configuration has once it is validated and has had an update."""
    loss_fn = config.loss_fn
    asked = {
        "clip_fraction_dual": loss_fn.ratio_clip_c,
        "kl_penalty": loss_fn.kl_penalty_in_loss or loss_fn.use_kl_in_reward,
        "is_oob_ratio": loss_fn.truncated_importance_sampling_type,
    }
    counted = _MATH if config.env.name == "math" else ()
    return (
        *(f"train:{name}" for name in (*_ROLLOUT, *counted, *_UPDATE)),
        *(f"train:{name}" for name, value in asked.items() if value),
        *(f"val:{name}" for name in (*_VALIDATION, *counted, *(f"pass@{k}" for k in config.grpo.pass_at))),
        *(f"time:{name}" for name in _PHASES),
        *(f"perf:{name}" for name in _RATES),
    )
