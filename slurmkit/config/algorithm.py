"""The algorithm's keys: how groups are drawn and judged, and the loss."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from slurmkit.config.kinds import Count, Finite, Positive, empty_if_null
from slurmkit.config.section import BeforeValidator, Field, Section, model_validator

MAX_REWARD = 1_000_000_000
"""Largest reward, and largest change of one by scaling or shaping.

Advantages and gradients are float32, whose largest number is 3.4e38. Two rewards differ by at most 2e9. The square,
4e18, summed over a million episodes is 4e24. The squared norm of the gradient has the factor that remains, 1e14.
"""
Bounded = Annotated[float, Field(ge=-MAX_REWARD, le=MAX_REWARD, allow_inf_nan=False)]


class AdvEstimator(Section):
    name: Literal["grpo", "reinforce_plus_plus", "maxrl"] = "grpo"
    """grpo compares an episode with its group (arXiv 2402.03300): normalize_rewards false is Dr. GRPO, and with
    use_leave_one_out_baseline true it is RLOO. reinforce_plus_plus divides by the spread of the whole step (arXiv
    2501.03262). maxrl divides by the group's mean reward (arXiv 2602.02710)."""
    minus_baseline: bool = True
    """With reinforce_plus_plus: first take the group's mean from each reward."""
    normalize_rewards: bool | None = None
    """grpo.normalize_rewards, and in its place if both are given; null is that key's."""
    use_leave_one_out_baseline: bool | None = None
    """grpo.use_leave_one_out_baseline, and in its place if both are given; null is that key's."""

    @model_validator(mode="after")
    def _baseline_is_an_option_of_one(self) -> Self:
        if not self.minus_baseline and self.name != "reinforce_plus_plus":
            raise ValueError(
                f"minus_baseline false is an option of reinforce_plus_plus, and name is {self.name}, which compares "
                "within the group in any case: set minus_baseline to true, or name to reinforce_plus_plus"
            )
        return self


class RewardScaling(Section):
    enabled: bool = False
    """Map rewards linearly from [source_min, source_max] to [target_min, target_max]; others are clamped first."""
    source_min: Bounded = 0.0
    """What becomes target_min."""
    source_max: Bounded = 1.0
    """What becomes target_max."""
    target_min: Bounded = 0.0
    """See source_min."""
    target_max: Bounded = 1.0
    """See source_max."""

    @model_validator(mode="after")
    def _has_a_slope(self) -> Self:
        if self.source_min >= self.source_max:
            raise ValueError(f"source_min {self.source_min:g} must be less than source_max {self.source_max:g}")
        return self


class RewardShaping(Section):
    """Rewards that follow a reply's length, after scaling: DAPO's soft penalty (arXiv 2503.14476, equation 13), or
    less for every truncated reply."""

    enabled: bool = False
    """Shape rewards."""
    overlong_buffer_length: Count | None = None
    """Tokens before max_response_length over which the penalty grows from nothing to all of it."""
    overlong_buffer_penalty: Annotated[float, Field(ge=0, le=MAX_REWARD, allow_inf_nan=False)] | None = 1.0
    """What a reply of max_response_length tokens loses of its reward."""
    max_response_length: Count | None = None
    """Tokens of a reply that cost the whole penalty; more cost no more."""
    stop_properly_penalty_coef: Annotated[float, Field(ge=0, le=1)] | None = None
    """Instead of the soft penalty: a truncated reply's reward is multiplied by this."""

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        soft = {name: getattr(self, name) for name in ("overlong_buffer_length", "max_response_length")}
        if self.enabled and self.stop_properly_penalty_coef is None and self.overlong_buffer_penalty is None:
            raise ValueError("the soft penalty needs overlong_buffer_penalty, which is null")
        given = [f"{name} {value}" for name, value in soft.items() if value is not None]
        if self.enabled and self.stop_properly_penalty_coef is not None and given:
            raise ValueError(
                f"stop_properly_penalty_coef {self.stop_properly_penalty_coef:g} takes the place of the soft penalty: "
                f"set it, or {' and '.join(given)}, to null"
            )
        if self.enabled and self.stop_properly_penalty_coef is None and len(given) < 2:
            missing = " and ".join(name for name, value in soft.items() if value is None)
            raise ValueError(
                f"the soft penalty needs {missing}; for truncated replies stop_properly_penalty_coef alone"
            )
        if self.enabled and (self.overlong_buffer_length or 0) > (self.max_response_length or 0):
            raise ValueError(
                f"overlong_buffer_length {self.overlong_buffer_length} is more than max_response_length "
                f"{self.max_response_length}, before which it lies"
            )
        return self


class AsyncGrpo(Section):
    """Sample for the next steps while one is trained on."""

    enabled: bool = False
    """Begin rollouts early. The loss must correct for older weights: loss_fn.use_importance_sampling_correction."""
    max_trajectory_age_steps: Annotated[int, Field(ge=0)] = 1
    """Steps that a rollout may begin early, so that its tokens are at most so many steps older than the policy that
    trains on them; 0 is synchronous."""
    in_flight_weight_updates: bool = False
    """With vLLM: completions under way go on with new weights as soon as there are some, each token remembering its
    own; false finishes them with the old ones first."""


class Grpo(Section):
    num_prompts_per_step: Count = 32
    """Tasks that a step draws."""
    num_generations_per_prompt: Count = 16
    """Episodes per task: the size of a group."""
    max_rollout_turns: Count = 10
    """Replies of the model in one episode, at most; its tool calls in the last one are still made."""
    max_num_epochs: Count = 1
    """Passes over the training tasks, at most."""
    max_num_steps: Count = 1_000_000
    """Steps, at most."""
    normalize_rewards: bool = True
    """With adv_estimator grpo: divide a group's advantages by its standard deviation; false is Dr. GRPO."""
    use_leave_one_out_baseline: bool = True
    """With adv_estimator grpo: compare an episode with the mean (and spread) of the others of its group, not of all."""
    adv_estimator: AdvEstimator = AdvEstimator()
    """How rewards become advantages."""
    advantage_clip_low: Annotated[float, Field(le=0, allow_inf_nan=False)] | None = None
    """Advantages below this are set to it; null leaves them."""
    advantage_clip_high: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Advantages above this are set to it; null leaves them."""
    use_dynamic_sampling: bool = False
    """Train on groups whose rewards differ alone, and draw further tasks until a step has enough of them (DAPO)."""
    dynamic_sampling_max_gen_batches: Count = 10
    """With dynamic sampling: give up when so many batches of tasks did not give a step its groups."""
    batch_multiplier: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """With dynamic sampling: a batch is this many times num_prompts_per_step tasks; what is too much is discarded."""
    overlong_filtering: bool = False
    """Truncated replies count in their group's statistics and leave the loss."""
    async_grpo: Annotated[AsyncGrpo, BeforeValidator(empty_if_null)] = AsyncGrpo()
    """Asynchronous training."""
    reward_scaling: RewardScaling = RewardScaling()
    """Linear, before shaping."""
    reward_shaping: RewardShaping = RewardShaping()
    """By length."""
    max_broken_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Give up when the environment broke in more than this part of a step's episodes; 1 never does."""
    val_period: Annotated[int, Field(ge=-1)] = 10
    """Validate after every so many steps; 0 and -1 are never."""
    val_at_start: bool = False
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    max_val_samples: Count | None = 256
    """Validation tasks, at most; null is all of them."""
    val_num_generations_per_prompt: Count = 1
    """Episodes per validation task; more than one also gives val:pass@k for k = 1, 2, 4 … up to as many."""
    stop_at_validation_metric: str | None = None
    """End the run, with everything saved, once this metric reaches its threshold: val:accuracy, val:reward_mean or a
    val:pass@k."""
    stop_at_validation_threshold: Finite | None = None
    """The least value of stop_at_validation_metric that is good enough."""
    max_steps_without_signal: Count | None = 10
    """Give up after so many steps in a row in which no group had a right and a wrong answer; null never does."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 42
    """Everything random follows from it: the order of tasks, every sampled token, a model made from scratch."""

    @model_validator(mode="after")
    def _a_group_can_differ(self) -> Self:
        if self.num_generations_per_prompt == 1 and self.adv_estimator.minus_baseline:
            raise ValueError(
                "num_generations_per_prompt is 1: an advantage compares the episodes of one task, so it needs 2 or "
                "more; adv_estimator.name reinforce_plus_plus with minus_baseline false alone does without"
            )
        return self

    @model_validator(mode="after")
    def _maxrl_has_positive_rewards(self) -> Self:
        shaping, scaling = self.reward_shaping, self.reward_scaling
        if self.adv_estimator.name == "maxrl":
            for key, lowers in (
                ("reward_shaping.max_response_length", shaping.enabled and shaping.max_response_length is not None),
                ("reward_scaling.target_min", scaling.enabled and min(scaling.target_min, scaling.target_max) < 0),
            ):
                if lowers:
                    raise ValueError(
                        f"adv_estimator.name maxrl divides by a mean reward that must be positive, and {key} makes "
                        "rewards that are not: take another estimator, or leave the rewards positive"
                    )
        return self

    @model_validator(mode="after")
    def _a_multiple_is_sampled_from(self) -> Self:
        if self.batch_multiplier != 1 and not self.use_dynamic_sampling:
            raise ValueError(
                f"batch_multiplier {self.batch_multiplier:g} is of dynamic sampling: set use_dynamic_sampling to true, "
                "or leave it at 1"
            )
        return self

    @model_validator(mode="after")
    def _the_run_can_stop(self) -> Self:
        metric, threshold = self.stop_at_validation_metric, self.stop_at_validation_threshold
        known = ["val:accuracy", "val:reward_mean", *(f"val:pass@{k}" for k in self.pass_at)]
        if (metric is None) != (threshold is None):
            raise ValueError(
                f"stop_at_validation_metric {metric or 'null'} and stop_at_validation_threshold "
                f"{'null' if threshold is None else f'{threshold:g}'} go together: give both, or neither"
            )
        if metric is not None and metric not in known:
            raise ValueError(
                f"stop_at_validation_metric {metric} is never computed with val_num_generations_per_prompt "
                f"{self.val_num_generations_per_prompt}: it must be one of {', '.join(known)}"
            )
        if metric is not None and self.val_period < 1:
            raise ValueError(
                f"stop_at_validation_metric {metric} is looked at whenever there is a validation, and val_period "
                f"{self.val_period} leaves them out: it must be at least 1"
            )
        return self

    @property
    def normalizes(self) -> bool:
        """True if a group's advantages are divided by its standard deviation."""
        own = self.adv_estimator.normalize_rewards
        return self.normalize_rewards if own is None else own

    @property
    def leaves_one_out(self) -> bool:
        """True if an episode is compared with the others of its group, without itself."""
        own = self.adv_estimator.use_leave_one_out_baseline
        return self.use_leave_one_out_baseline if own is None else own

    @property
    def max_age(self) -> int:
        """Steps that a rollout may begin before its own; 0 in synchronous training."""
        return self.async_grpo.max_trajectory_age_steps if self.async_grpo.enabled else 0

    @property
    def updates_in_flight(self) -> bool:
        """Whether completions under way go on with new weights."""
        return self.max_age > 0 and self.async_grpo.in_flight_weight_updates

    @property
    def tasks_per_batch(self) -> int:
        """Tasks that are drawn together."""
        return math.ceil(self.num_prompts_per_step * self.batch_multiplier)

    @property
    def pass_at(self) -> tuple[int, ...]:
        """Each k of val:pass@k: powers of two, and the number of episodes itself; none for a single episode."""
        count = self.val_num_generations_per_prompt
        powers = (1 << exponent for exponent in range(count.bit_length()))
        return tuple(sorted({*powers, count})) if count > 1 else ()


class LossFn(Section):
    """The loss. docs/losses.md has the formula and the paper of each option."""

    ratio_clip_min: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The importance ratio is clipped below 1 minus this; 1 never clips there."""
    ratio_clip_max: Annotated[float, Field(ge=0)] = 0.2
    """The importance ratio is clipped above 1 plus this; larger than ratio_clip_min is DAPO's clip-higher."""
    ratio_clip_c: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Dual clip: where the advantage is negative, the ratio counts as no more than this. 3 is usual."""
    sequence_level_importance_ratios: bool = False
    """GSPO: one ratio for a whole sequence, the geometric mean of its tokens' ratios."""
    use_cispo: bool = False
    """CISPO: the clipped ratio weighs the gradient of every token, and none is cut off."""
    force_on_policy_ratio: bool = False
    """Take the ratio for 1, as it is where a step makes one update."""
    disable_ppo_ratio: bool = False
    """REINFORCE: no ratio and no clipping, whoever sampled the tokens."""
    token_level_loss: bool = True
    """Every trained token of an optimiser step counts alike (DAPO); false counts every episode alike (GRPO)."""
    constant_length: Count | None = None
    """With token_level_loss false: divide an episode's sum by this instead of its own length (Dr. GRPO)."""
    entropy_bonus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """What a token's entropy, in nats, is multiplied by before it is taken off the loss."""

    reference_policy_kl_penalty: Annotated[float, Field(ge=0, le=MAX_REWARD, allow_inf_nan=False)] = 0.0
    """What the KL divergence from the model that training began with costs; 0 loads no such reference model."""
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    """How that KL is estimated from the sampled tokens. In the loss the gradient is KL's own with all three; in the
    reward only with k1."""
    use_kl_in_reward: bool = False
    """Take the penalty off the reward of the episode, before the advantage, instead of adding it to the loss."""
    use_on_policy_kl_approximation: bool = False
    """Weigh a token's KL by the ratio of policy and engine, so that it is the present policy's."""
    kl_input_clamp_value: Annotated[float, Field(gt=0, le=80)] | None = 20.0
    """A token's log-ratio of reference and policy is clamped to this on both sides; null leaves it."""
    kl_output_clamp_value: Positive | None = 10.0
    """A token's KL is clamped to this on both sides, and has no gradient outside; null leaves it."""

    use_importance_sampling_correction: bool = False
    """Recompute the sampled tokens' logprobs before a step's first update: the ratio is against those, and the engine's
    difference from them is a weight of its own. False takes the ratio against what the engine sampled from."""
    sequence_level_importance_sampling: bool = False
    """That weight is the product of a sequence's weights; sequence_level_importance_ratios implies it."""
    truncated_importance_sampling_type: Literal["tis", "mis", "icepop", "seq-mask-tis"] | None = None
    """What happens to a weight outside the bounds: tis clamps it; mis, and icepop with both bounds, make it 0;
    seq-mask-tis makes it 0 in a whole sequence whose geometric mean is outside. null keeps all weights."""
    truncated_importance_sampling_ratio: Positive | None = None
    """The upper bound."""
    truncated_importance_sampling_ratio_min: Positive | None = None
    """The lower bound; null is none."""

    @property
    def kl_penalty_in_loss(self) -> float:
        """What the loss multiplies the KL by."""
        return 0.0 if self.use_kl_in_reward else self.reference_policy_kl_penalty

    @property
    def needs_reference_logprobs(self) -> bool:
        """Whether there is a reference model."""
        return self.reference_policy_kl_penalty > 0

    @property
    def needs_prev_logprobs(self) -> bool:
        """Whether the policy's own logprobs are computed before a step's first update."""
        return self.use_importance_sampling_correction and not self.force_on_policy_ratio

    @property
    def trains_without_advantage(self) -> bool:
        """Whether a token whose advantage is 0 has a gradient."""
        return self.kl_penalty_in_loss > 0 or self.entropy_bonus > 0

    @model_validator(mode="after")
    def _one_normalization(self) -> Self:
        if self.token_level_loss and self.constant_length is not None:
            raise ValueError(
                f"constant_length {self.constant_length} is what an episode's sum is divided by, and token_level_loss "
                "true divides by the tokens of the whole optimiser step: set token_level_loss to false, or "
                "constant_length to null"
            )
        if self.token_level_loss and self.sequence_level_importance_ratios:
            raise ValueError(
                "sequence_level_importance_ratios true (GSPO) weighs every sequence alike, and token_level_loss true "
                "every token: set token_level_loss to false"
            )
        return self

    @model_validator(mode="after")
    def _one_surrogate(self) -> Self:
        chosen = {
            "disable_ppo_ratio": self.disable_ppo_ratio,
            "force_on_policy_ratio": self.force_on_policy_ratio,
            "use_cispo": self.use_cispo,
            "sequence_level_importance_ratios": self.sequence_level_importance_ratios,
        }
        names = [name for name, is_chosen in chosen.items() if is_chosen]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} exclude each other, as each says what becomes of the ratio: keep one"
            )
        if self.ratio_clip_c is not None and names and names != ["sequence_level_importance_ratios"]:
            raise ValueError(
                f"ratio_clip_c {self.ratio_clip_c} bounds the clipped ratio's loss, and {names[0]} true has another: "
                "set ratio_clip_c to null"
            )
        return self

    @model_validator(mode="after")
    def _one_place_for_the_kl(self) -> Self:
        if self.use_kl_in_reward and not self.reference_policy_kl_penalty:
            raise ValueError("use_kl_in_reward true takes reference_policy_kl_penalty off, which is 0: set it above 0")
        if self.use_kl_in_reward and self.reference_policy_kl_type != "k1":
            raise ValueError(
                f"use_kl_in_reward true with reference_policy_kl_type {self.reference_policy_kl_type} would follow "
                "something else than the KL's gradient (arXiv 2512.21852): set it to k1"
            )
        if self.use_on_policy_kl_approximation and not self.kl_penalty_in_loss:
            raise ValueError(
                "use_on_policy_kl_approximation true weighs the KL in the loss, and there is none: set "
                "reference_policy_kl_penalty above 0 and use_kl_in_reward to false, or it to false"
            )
        return self

    @model_validator(mode="after")
    def _one_correction(self) -> Self:
        kind, low = self.truncated_importance_sampling_type, self.truncated_importance_sampling_ratio_min
        high = self.truncated_importance_sampling_ratio
        if not self.use_importance_sampling_correction and (kind or self.sequence_level_importance_sampling):
            name = "truncated_importance_sampling_type" if kind else "sequence_level_importance_sampling"
            raise ValueError(
                f"{name} {kind or 'true'} is about the correction's weights: set use_importance_sampling_correction to "
                "true as well"
            )
        if kind and high is None:
            raise ValueError(f"truncated_importance_sampling_type {kind} needs truncated_importance_sampling_ratio")
        if kind is None and (high or low) is not None:
            raise ValueError(
                f"truncated_importance_sampling_ratio {high or low} bounds nothing: set "
                "truncated_importance_sampling_type to tis, mis, icepop or seq-mask-tis"
            )
        if kind in ("icepop", "seq-mask-tis"):
            if low is None:
                raise ValueError(
                    f"truncated_importance_sampling_type {kind} needs truncated_importance_sampling_ratio_min"
                )
            if self.corrects_sequences:
                raise ValueError(
                    f"truncated_importance_sampling_type {kind} weighs tokens, and "
                    "sequence_level_importance_sampling or sequence_level_importance_ratios true asks for one weight "
                    "per sequence: take tis or mis"
                )
        if high is not None and low is not None and low > high:
            raise ValueError(
                f"truncated_importance_sampling_ratio_min {low} is above truncated_importance_sampling_ratio {high}"
            )
        return self

    @property
    def corrects_sequences(self) -> bool:
        """Whether the correction has one weight per sequence."""
        return self.sequence_level_importance_sampling or self.sequence_level_importance_ratios
