"""The algorithm's keys: how groups are drawn and judged, and the loss."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from slurmkit.config.kinds import Count, Positive
from slurmkit.config.section import Field, Section, model_validator


class AdvEstimator(Section):
    name: Literal["grpo", "reinforce_plus_plus", "maxrl"] = "grpo"
    """grpo compares an episode with its group (arXiv 2402.03300): normalize_rewards false is Dr. GRPO, and with
    use_leave_one_out_baseline true it is RLOO. reinforce_plus_plus divides by the spread of the whole step (arXiv
    2501.03262). maxrl divides by the group's mean reward (arXiv 2602.02710)."""
    minus_baseline: bool = True
    """With reinforce_plus_plus: first take the group's mean from each reward."""

    @model_validator(mode="after")
    def _baseline_is_an_option_of_one(self) -> Self:
        if not self.minus_baseline and self.name != "reinforce_plus_plus":
            raise ValueError(
                f"minus_baseline false is an option of reinforce_plus_plus, and name is {self.name}, which compares "
                "within the group in any case: set minus_baseline to true, or name to reinforce_plus_plus"
            )
        return self


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
    """With adv_estimator grpo: divide a group's advantages by its standard deviation; false is Dr. GRPO."""
    use_leave_one_out_baseline: bool = True
    """With adv_estimator grpo: compare an episode with the mean (and spread) of the others of its group, not of all."""
    adv_estimator: AdvEstimator = AdvEstimator()
    """How rewards become advantages."""
    advantage_clip_low: Annotated[float, Field(le=0, allow_inf_nan=False)] | None = None
    """Advantages below this are set to it; null leaves them."""
    advantage_clip_high: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Advantages above this are set to it; null leaves them."""
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
        if self.num_generations_per_prompt == 1 and self.adv_estimator.minus_baseline:
            raise ValueError(
                "num_generations_per_prompt is 1, with which adv_estimator.name reinforce_plus_plus alone can do, with "
                "minus_baseline false: an advantage compares the episodes of one task, so it needs 2 or more"
            )
        return self


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

    reference_policy_kl_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """What the KL divergence from the model that training began with costs; 0 loads no such reference model."""
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    """How that KL is estimated from the sampled tokens. In the loss the gradient is KL's own with all three; in the
    reward only with k1."""
    use_kl_in_reward: bool = False
    """Take the penalty off the reward of the episode, before the advantage, instead of adding it to the loss."""
    use_on_policy_kl_approximation: bool = False
    """Weigh a token's KL by the ratio of policy and engine, so that it is the present policy's."""
    kl_input_clamp_value: Annotated[float, Field(gt=0, le=80)] = 20.0
    """A token's log-ratio of reference and policy is clamped to this on both sides."""
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
