"""The loss as a formula, its denominators, and what it must bear. Shapes: T positions of packed sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmkit.config.algorithm import LossFn
from slurmkit.config.section import ValidationError
from slurmkit.grpo.batch import MicroBatch, optimizer_steps
from slurmkit.grpo.loss import policy_loss
from slurmkit.grpo.loss_sums import LossSums
from slurmkit.rollout.sample import Sample
from tests.support.requirements import REPOSITORY
from tests.support.tabular_policy import Table, a_sample, a_table, forward, near


def a_batch(
    logprobs: Sequence[float],
    sampled: Sequence[float],
    advantages: Sequence[float],
    *,
    lengths: tuple[int, ...] | None = None,
    mask: Sequence[bool] | None = None,
    prev: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
) -> tuple[torch.Tensor, MicroBatch]:
    """The policy's logprobs as a leaf, and the rest; every trained token weighs 1."""
    size = len(logprobs)
    return torch.tensor(logprobs, requires_grad=True), MicroBatch(
        token_ids_T=torch.zeros(size).long(),
        position_ids_T=torch.zeros(size).long(),
        lengths=lengths or (size,),
        mask_T=torch.tensor([True] * size if mask is None else mask),
        sampled_logprobs_T=torch.tensor(sampled),
        advantages_T=torch.tensor(advantages),
        weights_T=torch.ones(size),
        prev_logprobs_T=None if prev is None else torch.tensor(prev),
        reference_logprobs_T=None if reference is None else torch.tensor(reference),
    )


def compute(logprobs_T: torch.Tensor, batch: MicroBatch, **options: Any) -> tuple[torch.Tensor, LossSums]:
    loss_fn = LossFn(**{"ratio_clip_min": 0.2, "ratio_clip_max": 0.3, **options})
    return policy_loss(logprobs_T, torch.zeros_like(logprobs_T), batch, loss_fn)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, (0, 0, 0)),
        (1.2, 1.0, -1.2, (0, 0, 0)),
        (1.5, 1.0, -1.3, (0, 1, 0)),  # above the upper bound, and would gain from going on
        (0.5, 1.0, -0.5, (0, 0, 0)),  # too low already: clipping would only hide that
        (0.5, -1.0, 0.8, (1, 0, 0)),  # below the lower bound
        (1.5, -1.0, 1.5, (0, 0, 0)),
        (9.0, -1.0, 3.0, (0, 0, 1)),  # the second clip
        (9.0, 1.0, -1.3, (0, 1, 0)),
    ],
)
def test_one_token_has_the_clipped_surrogate_as_its_loss(
    ratio: float, advantage: float, loss: float, clipped: tuple[int, int, int]
) -> None:
    value, sums = compute(*a_batch([math.log(ratio) - 1.0], [-1.0], [advantage]), ratio_clip_c=3.0)
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert (sums.clipped_low, sums.clipped_high, sums.clipped_dual) == clipped
    assert sums.approximate_kl == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-5)


def test_metrics_are_means_over_trained_tokens_under_their_names() -> None:
    ratios = [1.5, 0.5, 1.0]
    logprobs_T, batch = a_batch(
        [math.log(ratio) - 1.0 for ratio in ratios], [-1.0] * 3, [1.0, -1.0, 1.0], reference=[-1.0] * 3
    )
    loss_fn = LossFn(reference_policy_kl_penalty=0.1, ratio_clip_c=3.0)
    batch = replace(batch, mask_T=torch.tensor([True, True, False]))
    loss, sums = policy_loss(logprobs_T, torch.tensor([0.5, 1.5, 9.0]), batch, loss_fn)
    kl = [1 / ratio - 1 + math.log(ratio) for ratio in ratios[:2]]
    found = (sums + sums).metrics(loss_fn, 2) | (sums + sums).engine_metrics(loss_fn)
    assert found == pytest.approx(
        {
            "train:loss": loss.item(),
            "train:policy_loss": -1.2 + 0.8,
            "train:ratio_mean": 1.0,
            "train:ratio_min": 0.5,
            "train:ratio_max": 1.5,
            "train:clip_fraction": 1.0,
            "train:clip_fraction_low": 0.5,
            "train:clip_fraction_high": 0.5,
            "train:clip_fraction_dual": 0.0,
            "train:approx_kl": sum(ratio - 1 - math.log(ratio) for ratio in ratios[:2]) / 2,
            "train:kl_penalty": sum(kl) / 2,
            "train:entropy": 1.0,
            "train:token_mult_prob_error": (1.5 + 2.0) / 2,
            "train:gen_kl_error": sum(ratio - 1 - math.log(ratio) for ratio in ratios[:2]) / 2,
            "train:sampling_importance_ratio": 1.0,
        },
        abs=1e-6,
    )
    assert loss.item() == pytest.approx(-1.2 + 0.8 + 0.1 * sum(kl), abs=1e-6)


def test_engine_error_is_measured_against_logprobs_of_the_same_weights() -> None:
    """With the policy two updates further on, its logprobs before the first one are compared with the engine's."""
    correction = {"use_importance_sampling_correction": True}
    _, sums = compute(*a_batch([-3.0], [-1.0], [1.0], prev=[-1.0 + math.log(1.25)]), **correction)
    assert sums.probability_error == pytest.approx(1.25, abs=1e-6)
    assert sums.correction == pytest.approx(1.25, abs=1e-6)
    assert sums.engine_kl == pytest.approx(1.25 - 1 - math.log(1.25), abs=1e-6)


TABLE = a_table(1)
OPTIONS: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"token_level_loss": False},
    "constant": {"token_level_loss": False, "constant_length": 3},
    "gspo": {"token_level_loss": False, "sequence_level_importance_ratios": True},
    "cispo_entropy": {"use_cispo": True, "entropy_bonus": 0.1},
    "kl": {"reference_policy_kl_penalty": 0.1, "use_on_policy_kl_approximation": True},
    "tis": {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.1,
    },
    "mis_sequences": {
        "use_importance_sampling_correction": True,
        "sequence_level_importance_sampling": True,
        "truncated_importance_sampling_type": "mis",
        "truncated_importance_sampling_ratio": 1.1,
    },
    "seq-mask-tis": {
        "token_level_loss": False,
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "seq-mask-tis",
        "truncated_importance_sampling_ratio": 1.1,
        "truncated_importance_sampling_ratio_min": 0.9,
    },
}
UNEVEN = [(1, 2), (4,), (3, 3), (0, 4), (4,), (2, 1), (2, 2), (4,)]


def samples_of(episodes: Sequence[Sequence[int]]) -> list[Sample]:
    """With advantages of both signs, one of them 0."""
    where: dict[str, Table] = {"prev": near(TABLE, 4), "reference": near(TABLE, 5)}
    return [
        a_sample(each, math.cos(2 * index) if index != 3 else 0.0, near(TABLE, 3), **where, rollout_id=index)
        for index, each in enumerate(episodes)
    ]


def step_of(
    samples: Sequence[Sample], options: dict[str, Any], *, budget: int = 99, num_ranks: int = 1
) -> tuple[float, torch.Tensor, LossSums, list[int]]:
    """Loss, gradient and sums of one optimiser step, everything added up; micro-batches of each rank."""
    loss_fn = LossFn(**options)
    table = TABLE.clone().requires_grad_()
    (step,) = optimizer_steps(
        samples, global_batch_size=len(samples), micro_batch_tokens=budget, num_ranks=num_ranks, loss_fn=loss_fn
    )
    total, sums = 0.0, LossSums()
    for rank in step.ranks:
        for micro_batch in rank:
            loss, part = policy_loss(*forward(table, micro_batch), micro_batch, loss_fn)
            loss.backward()
            total, sums = total + loss.item(), sums + part
    assert table.grad is not None
    return total, table.grad, sums, [len(rank) for rank in step.ranks]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_micro_batch_and_rank_splits_keep_loss_gradient_and_metrics(options: dict[str, Any]) -> None:
    samples = samples_of(UNEVEN)
    loss, gradient, sums, counts = step_of(samples, options)
    assert counts == [1]
    seen = set()
    for num_ranks in (1, 2, 4):
        for budget in (3, 6, 12):
            other, other_gradient, other_sums, counts = step_of(samples, options, budget=budget, num_ranks=num_ranks)
            seen.add(tuple(counts))
            assert other == pytest.approx(loss, abs=1e-6)
            torch.testing.assert_close(other_gradient, gradient, atol=1e-6, rtol=0)
            for name in LossSums.__slots__:
                assert getattr(other_sums, name) == pytest.approx(getattr(sums, name), abs=1e-5), name
    assert len(seen) >= 5


def test_a_rank_with_nothing_to_train_on_adds_nothing_and_keeps_a_graph() -> None:
    samples = samples_of(UNEVEN[:3])
    loss, gradient, sums, _ = step_of(samples, {})
    other, other_gradient, other_sums, counts = step_of(samples, {}, num_ranks=4)
    assert counts == [1] * 4
    assert other == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-6, rtol=0)
    assert other_sums.ratio_min == sums.ratio_min
    logprobs_T, batch = a_batch([-1.0], [0.0], [0.0], mask=[False])
    nothing, _ = compute(logprobs_T, batch)
    nothing.backward()
    assert nothing.item() == 0
    assert logprobs_T.grad is not None


def divided_by_hand(sample: Sample, divisor: float) -> float:
    """The surrogate without clips, every token of the sample divided by the same."""
    now = a_sample(sample.token_ids[1:].tolist(), 0.0, TABLE).logprobs
    return -float((sample.advantage * numpy.exp(now - sample.logprobs))[sample.loss_mask].sum()) / divisor


@pytest.mark.parametrize("name", ["token", "sequence", "constant"])
def test_normalisations_are_those_of_dapo_grpo_and_dr_grpo(name: str) -> None:
    samples = samples_of(UNEVEN)
    tokens, episodes = sum(sample.num_trained_tokens for sample in samples), len(samples)
    divisors = {
        "token": lambda sample: tokens,
        "sequence": lambda sample: episodes * sample.num_trained_tokens,
        "constant": lambda sample: episodes * 3,
    }
    options = {**OPTIONS[name], "ratio_clip_min": 1.0, "ratio_clip_max": 1e6}
    loss, _, _, _ = step_of(samples, options)
    by_hand = sum(divided_by_hand(sample, divisors[name](sample)) for sample in samples)
    assert loss == pytest.approx(by_hand, abs=1e-6)


def cut(sample: Sample) -> list[Sample]:
    """The same episode as two samples of a token each: the second has the first in its prompt."""
    first = numpy.array([False, True, False])
    return [replace(sample, loss_mask=mask) for mask in (first, numpy.array([False, False, True]))]


@pytest.mark.parametrize("name", ["token", "sequence", "constant", "kl"])
def test_an_episode_that_became_several_samples_counts_once(name: str) -> None:
    samples = samples_of(UNEVEN)
    split = [*cut(samples[0]), *samples[1:]]
    loss, gradient, _, _ = step_of(samples, OPTIONS[name])
    other, other_gradient, _, _ = step_of(split, OPTIONS[name])
    assert other == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["token", "sequence", "constant"])
def test_a_sample_of_which_nothing_is_trained_is_in_no_mean(name: str) -> None:
    samples = samples_of(UNEVEN)
    ghost = replace(samples[0], loss_mask=numpy.array([False] * 3), rollout_id=99)
    for options in (OPTIONS[name], {**OPTIONS[name], "entropy_bonus": 0.5}):
        loss, gradient, _, _ = step_of(samples, options)
        other, other_gradient, _, _ = step_of([*samples, ghost], options)
        assert other == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(other_gradient, gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"entropy_bonus": 0.1}, {"reference_policy_kl_penalty": 0.1}, {}])
def test_samples_without_advantage_are_skipped_only_without_a_gradient(options: dict[str, Any]) -> None:
    _, _, sums, _ = step_of(samples_of(UNEVEN), options)
    assert sums.tokens == sum(len(each) for each in UNEVEN) - (0 if options else len(UNEVEN[3]))


numbers = st.floats(-1e6, 1e6, width=32)
garbage = st.floats(width=32)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], tuple[int, ...], torch.Tensor]:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    size = sum(lengths)
    mask_T = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    names = ("logprobs", "entropy", "sampled", "prev", "reference", "advantages", "weights")
    tensors = {name: torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size))) for name in names}
    tensors["advantages"] = tensors["advantages"].clamp(-9, 9)
    tensors["weights"] = tensors["weights"].abs().clamp(max=1)
    hidden = {name: torch.tensor(draw(st.lists(garbage, min_size=size, max_size=size))) for name in names}
    dirty = {name: torch.where(mask_T, tensors[name], hidden[name]) for name in names}
    return {**tensors, **{f"dirty_{name}": value for name, value in dirty.items()}}, tuple(lengths), mask_T


HARD: list[dict[str, Any]] = [
    *OPTIONS.values(),
    {"disable_ppo_ratio": True},
    {"force_on_policy_ratio": True, "use_importance_sampling_correction": True},
    {"ratio_clip_c": 3.0},
    *(
        {"reference_policy_kl_penalty": 1.0, "reference_policy_kl_type": kind, "kl_output_clamp_value": None}
        for kind in ("k1", "k2", "k3")
    ),
]


@given(drawn=ragged(), options=st.sampled_from(HARD))
@settings(max_examples=150, deadline=None)
def test_random_batches_give_finite_numbers_and_ignore_masked_positions(
    drawn: tuple[dict[str, torch.Tensor], tuple[int, ...], torch.Tensor], options: dict[str, Any]
) -> None:
    tensors, lengths, mask_T = drawn
    results = []
    for prefix in ("", "dirty_"):
        logprobs_T = tensors[f"{prefix}logprobs"].clone().requires_grad_()
        entropy_T = tensors[f"{prefix}entropy"].clone().requires_grad_()
        batch = MicroBatch(
            token_ids_T=torch.zeros(len(mask_T)).long(),
            position_ids_T=torch.zeros(len(mask_T)).long(),
            lengths=lengths,
            mask_T=mask_T,
            sampled_logprobs_T=tensors[f"{prefix}sampled"],
            advantages_T=tensors[f"{prefix}advantages"],
            weights_T=tensors[f"{prefix}weights"],
            prev_logprobs_T=tensors[f"{prefix}prev"],
            reference_logprobs_T=tensors[f"{prefix}reference"],
        )
        loss, sums = policy_loss(logprobs_T, entropy_T, batch, LossFn(**options))
        loss.backward()
        assert logprobs_T.grad is not None
        gradients = [logprobs_T.grad, *([] if entropy_T.grad is None else [entropy_T.grad])]
        for gradient_T in gradients:
            assert torch.isfinite(gradient_T).all()
            assert not gradient_T[~mask_T].any()
        assert torch.isfinite(loss)
        if mask_T.any():
            assert all(math.isfinite(getattr(sums, name)) for name in LossSums.__slots__)
        results.append((loss.item(), sums, [gradient_T.tolist() for gradient_T in gradients]))
    assert results[0] == results[1]


@pytest.mark.parametrize(("difference", "kl"), [(50.0, math.exp(20) - 21), (-50.0, 19.0), (1e6, math.exp(20) - 21)])
@pytest.mark.parametrize("limit", [10.0, None])
def test_a_reference_far_away_has_a_finite_kl(difference: float, kl: float, limit: float | None) -> None:
    logprobs_T, batch = a_batch([-60.0], [-60.0], [0.0], reference=[-60.0 + difference])
    loss, sums = compute(logprobs_T, batch, reference_policy_kl_penalty=1.0, kl_output_clamp_value=limit)
    loss.backward()
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == [0.0]
    assert sums.reference_kl == pytest.approx(limit or kl, rel=1e-6)


def test_without_clamps_a_kl_is_the_bare_estimate() -> None:
    bare = {"kl_input_clamp_value": None, "kl_output_clamp_value": None, "reference_policy_kl_penalty": 1.0}
    for kind, kl in (("k1", -25.0), ("k2", 312.5), ("k3", math.expm1(25) - 25)):
        logprobs_T, batch = a_batch([-60.0], [-60.0], [0.0], reference=[-35.0])
        loss, sums = compute(logprobs_T, batch, reference_policy_kl_type=kind, **bare)
        loss.backward()
        assert sums.reference_kl == pytest.approx(kl, rel=1e-6)
        assert logprobs_T.grad is not None
        assert logprobs_T.grad.tolist() == [-25.0]


def test_is_oob_ratio_counts_sequences_with_seq_mask_tis() -> None:
    """Sequences of 1, 3 and 2 trained tokens: geometric means 1.5, (0.9 · 1.1 · 1.6)^(1/3) = 1.17 and 1.0.

    With the bounds 0.8 and 1.2 one sequence of three is out of bounds, as NeMo RL counts; it has one token of six.
    The fourth sequence trains no token and is not counted. `icepop` counts tokens: 1.5 and 1.6 are two of six.
    """
    ratios = [9.0, 1.5, 9.0, 0.9, 1.1, 1.6, 9.0, 1.0, 1.0, 9.0, 9.0]
    trained = [False, True, False, True, True, True, False, True, True, False, False]
    prev = [math.log(ratio) - 1.0 for ratio in ratios]
    found = {}
    for kind in ("seq-mask-tis", "icepop"):
        options = {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": kind,
            "truncated_importance_sampling_ratio": 1.2,
            "truncated_importance_sampling_ratio_min": 0.8,
        }
        batch = a_batch(prev, [-1.0] * 11, [1.0] * 11, lengths=(2, 4, 3, 2), mask=trained, prev=prev)
        _, sums = compute(*batch, **options)
        found[kind] = (sums + sums).engine_metrics(LossFn(**options))["train:is_oob_ratio"]
    assert found == pytest.approx({"seq-mask-tis": 1 / 3, "icepop": 2 / 6})


def test_the_mean_weight_is_over_sequences_if_a_sequence_has_one() -> None:
    """Weights 1.5 and 2 · 2 · 2 = 8 of sequences of 1 and 3 trained tokens: the mean is 4.75, over tokens 6.375."""
    prev = [math.log(ratio) - 1.0 for ratio in (9.0, 1.5, 9.0, 2.0, 2.0, 2.0)]
    batch = a_batch(prev, [-1.0] * 6, [1.0] * 6, lengths=(2, 4), mask=[False, True, False, True, True, True], prev=prev)
    options = {"use_importance_sampling_correction": True, "sequence_level_importance_sampling": True}
    _, sums = compute(*batch, **options)
    assert sums.engine_metrics(LossFn(**options))["train:sampling_importance_ratio"] == pytest.approx(4.75)
    options["sequence_level_importance_sampling"] = False
    _, sums = compute(*batch, **options)
    assert sums.engine_metrics(LossFn(**options))["train:sampling_importance_ratio"] == pytest.approx(1.875)


def test_sequence_weights_mask_a_small_mismatch_that_token_weights_keep() -> None:
    """0.012 on each of 100 tokens is a product of 3.3, above the usual bound of 3; every token's weight is 1.012."""
    logprobs_T, batch = a_batch([-1.0] * 100, [-1.012] * 100, [1.0] * 100, prev=[-1.0] * 100)
    bounds = {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "mis",
        "truncated_importance_sampling_ratio": 3.0,
    }
    by_tokens, sums = compute(logprobs_T, batch, **bounds)
    assert by_tokens.item() == pytest.approx(-100 * math.exp(0.012), rel=1e-5)
    assert sums.out_of_bounds == 0
    whole, sums = compute(logprobs_T, batch, **bounds, sequence_level_importance_sampling=True)
    assert whole.item() == 0
    assert sums.out_of_bounds == 100


def test_on_policy_the_loss_is_0_though_its_gradient_is_not() -> None:
    logprobs_T, batch = a_batch([-1.0, -2.0], [-1.0, -2.0], [1.0, -1.0])
    loss, sums = compute(logprobs_T, batch)
    loss.backward()
    assert loss.item() == 0
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == [-1.0, 1.0]
    assert sums.ratio == 2
    assert "near 0" in (REPOSITORY / "docs" / "losses.md").read_text()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_importance_sampling_correction": True}, "prev_logprobs"),
        ({"reference_policy_kl_penalty": 0.1}, "reference_logprobs"),
    ],
)
def test_logprobs_that_are_missing_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        compute(*a_batch([-1.0], [-1.0], [1.0]), **options)


TIS = {"use_importance_sampling_correction": True, "truncated_importance_sampling_type": "tis"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_level_importance_ratios": True}, "set token_level_loss to false"),
        ({"constant_length": 7}, "constant_length 7"),
        ({"use_cispo": True, "disable_ppo_ratio": True}, "disable_ppo_ratio and use_cispo exclude each other"),
        ({**OPTIONS["gspo"], "use_cispo": True}, "use_cispo and sequence_level_importance_ratios exclude"),
        ({"ratio_clip_c": 1.0}, "ratio_clip_c: should be greater than 1"),
        ({"ratio_clip_c": 3.0, "use_cispo": True}, "ratio_clip_c 3.0 bounds the clipped ratio's loss"),
        ({"use_kl_in_reward": True}, "set it above 0"),
        ({"use_kl_in_reward": True, "reference_policy_kl_penalty": 0.1}, "set it to k1"),
        ({"use_on_policy_kl_approximation": True}, "there is none"),
        ({"truncated_importance_sampling_type": "tis"}, "set use_importance_sampling_correction to true as well"),
        ({"sequence_level_importance_sampling": True}, "set use_importance_sampling_correction to true as well"),
        (TIS, "tis needs truncated_importance_sampling_ratio"),
        ({"truncated_importance_sampling_ratio": 2.0}, "2.0 bounds nothing"),
        ({"truncated_importance_sampling_ratio_min": 2.0}, "2.0 bounds nothing"),
        (
            {**TIS, "truncated_importance_sampling_ratio": 2.0, "truncated_importance_sampling_ratio_min": 3.0},
            "3.0 is above truncated_importance_sampling_ratio 2.0",
        ),
        (
            {**TIS, "truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio": 2.0},
            "icepop needs truncated_importance_sampling_ratio_min",
        ),
        ({**OPTIONS["seq-mask-tis"], "sequence_level_importance_sampling": True}, "take tis or mis"),
        ({"entropy_bonus": -0.1}, "entropy_bonus"),
        ({"truncated_importance_sampling_type": "clip"}, "'tis', 'mis', 'icepop' or 'seq-mask-tis'"),
    ],
)
def test_incompatible_options_are_refused_with_the_correct_setting(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossFn(**options)
