"""The gradient of every option against the true one, by exact expectation over a policy small enough to enumerate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from slurmkit.config.algorithm import Grpo, LossFn
from slurmkit.envs.environment import Task
from slurmkit.grpo.advantage import advantages
from slurmkit.grpo.credit import credit, make_samples
from slurmkit.grpo.loss import policy_loss
from slurmkit.grpo.loss_sums import LossSums
from slurmkit.rollout.collect import Group
from slurmkit.rollout.episode import Episode
from slurmkit.rollout.sample import Sample
from tests.support.groups import completion, conversation
from tests.support.tabular_policy import (
    EPISODES,
    NUM_TOKENS,
    PROMPT,
    Table,
    a_sample,
    a_table,
    forward,
    in_one_batch,
    near,
    probability,
    token_logprobs,
)

SINGLE_TOKENS = [(token,) for token in range(NUM_TOKENS)]
REWARD = {episode: math.sin(7 * index) for index, episode in enumerate([*EPISODES, *SINGLE_TOKENS[:4]])}
UNCLIPPED = {"ratio_clip_min": 1.0, "ratio_clip_max": 1e6}


def gradient_of(value: torch.Tensor, table: Table) -> torch.Tensor:
    return torch.autograd.grad(value, table)[0]


def estimated(
    table: Table, samples: Sequence[Sample], weights: Sequence[float], **options: Any
) -> tuple[torch.Tensor, torch.Tensor, LossSums]:
    """The loss, its gradient, and the sums behind the metrics."""
    batch = in_one_batch(samples, weights)
    loss, sums = policy_loss(*forward(table, batch), batch, LossFn(**options))
    return loss.detach(), gradient_of(loss, table), sums


def weighed(table: Table, episodes: Sequence[Sequence[int]] = EPISODES) -> list[float]:
    return [probability(table.detach(), episode).item() for episode in episodes]


def expected_return(table: Table, episodes: Sequence[tuple[int, ...]] = EPISODES) -> torch.Tensor:
    return sum((probability(table, each) * REWARD[each] for each in episodes), torch.tensor(0.0))


CORRECTION = {"use_importance_sampling_correction": True}
BOUNDS = {"truncated_importance_sampling_ratio": 2.0, "truncated_importance_sampling_ratio_min": 0.5}
GSPO = {"sequence_level_importance_ratios": True, "token_level_loss": False}
ON_POLICY: dict[str, dict[str, Any]] = {
    "clipped": {},
    "dual_clip": {"ratio_clip_c": 3.0},
    "gspo": GSPO,
    "cispo": {"use_cispo": True},
    "forced": {"force_on_policy_ratio": True},
    "no_ratio": {"disable_ppo_ratio": True},
    "corrected": CORRECTION,
    "corrected_forced": {**CORRECTION, "force_on_policy_ratio": True},
    "corrected_sequences": {**CORRECTION, "sequence_level_importance_sampling": True},
    **{
        kind: {**CORRECTION, **BOUNDS, "truncated_importance_sampling_type": kind}
        for kind in ("tis", "mis", "icepop", "seq-mask-tis")
    },
}


@pytest.mark.parametrize("options", ON_POLICY.values(), ids=ON_POLICY)
def test_on_policy_every_surrogate_has_the_gradient_of_the_return(options: dict[str, Any]) -> None:
    table = a_table(1, requires_grad=True)
    samples = [a_sample(each, REWARD[each] - 0.3, table, prev=table) for each in EPISODES]
    _, gradient, sums = estimated(table, samples, weighed(table), **options)
    torch.testing.assert_close(-gradient, gradient_of(expected_return(table), table), atol=1e-6, rtol=0)
    assert sums.ratio / sums.tokens == pytest.approx(1, abs=1e-6)


def test_off_policy_samples_give_the_gradient_of_the_current_return() -> None:
    table = a_table(1, requires_grad=True)
    older = near(table, 2)
    samples = [a_sample(each, REWARD[each], older) for each in SINGLE_TOKENS]
    _, gradient, _ = estimated(table, samples, weighed(older, SINGLE_TOKENS), **UNCLIPPED)
    truth = gradient_of(expected_return(table, SINGLE_TOKENS), table)
    torch.testing.assert_close(-gradient, truth, atol=1e-6, rtol=0)


def test_correction_and_ratio_together_give_the_current_policys_gradient() -> None:
    table = a_table(1, requires_grad=True)
    before, engine = near(table, 2), near(table, 3)
    samples = [a_sample(each, REWARD[each], engine, prev=before) for each in SINGLE_TOKENS]
    weights = weighed(engine, SINGLE_TOKENS)
    _, gradient, _ = estimated(table, samples, weights, **CORRECTION, **UNCLIPPED)
    truth = gradient_of(expected_return(table, SINGLE_TOKENS), table)
    torch.testing.assert_close(-gradient, truth, atol=1e-6, rtol=0)


def test_a_correction_of_whole_sequences_is_exact_and_one_of_tokens_is_not() -> None:
    table = a_table(1, requires_grad=True)
    engine = near(table, 3)
    samples = [a_sample(each, REWARD[each], engine, prev=table) for each in EPISODES]
    truth = gradient_of(expected_return(table), table)
    options = {**CORRECTION, "sequence_level_importance_sampling": True}
    _, gradient, _ = estimated(table, samples, weighed(engine), **options)
    torch.testing.assert_close(-gradient, truth, atol=1e-6, rtol=0)
    _, of_tokens, _ = estimated(table, samples, weighed(engine), **CORRECTION)
    assert (of_tokens + truth).abs().max() > 1e-3


def clip(ratio: torch.Tensor) -> torch.Tensor:
    return ratio.clamp(0.9, 1.3)


def pessimistic(ratio: torch.Tensor, advantage: float) -> torch.Tensor:
    return -torch.min(ratio * advantage, clip(ratio) * advantage)


def of_tokens(term: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A loss of an episode as the sum of its tokens' terms, from each one's logprob now, before, and in the engine."""

    def loss(now: torch.Tensor, prev: torch.Tensor, engine: torch.Tensor, advantage: float) -> torch.Tensor:
        return torch.stack([term(*each, advantage) for each in zip(now, prev, engine, strict=True)]).sum()

    return loss


def gspo(now: torch.Tensor, prev: torch.Tensor, engine: torch.Tensor, advantage: float) -> torch.Tensor:
    """Equation 5 of arXiv 2507.18071, times the length, as here every token has the weight."""
    return len(now) * pessimistic((now - engine).mean().exp(), advantage)


def corrected(weight: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The clipped surrogate against the policy before, with the weights that the log-differences of an episode give."""

    def loss(now: torch.Tensor, prev: torch.Tensor, engine: torch.Tensor, advantage: float) -> torch.Tensor:
        ratios = (now - prev).exp()
        return (weight(prev - engine) * torch.stack([pessimistic(ratio, advantage) for ratio in ratios])).sum()

    return loss


def zero_outside(weights: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return weights * ((weights >= low) & (weights <= high))


OFF_POLICY: dict[str, tuple[dict[str, Any], Callable[..., torch.Tensor]]] = {
    "clip": ({}, of_tokens(lambda now, prev, engine, a: pessimistic((now - engine).exp(), a))),
    "dual_clip": (
        {"ratio_clip_c": 1.4},
        of_tokens(
            lambda now, prev, engine, a: (
                pessimistic((now - engine).exp(), a)
                if a >= 0
                else torch.min(pessimistic((now - engine).exp(), a), torch.tensor(-1.4 * a))
            )
        ),
    ),
    "cispo": (
        {"use_cispo": True},
        of_tokens(lambda now, prev, engine, a: -a * clip((now - engine).exp()).detach() * now),
    ),
    "no_ratio": ({"disable_ppo_ratio": True}, of_tokens(lambda now, prev, engine, a: -a * now)),
    "gspo": (GSPO, gspo),
    "corrected": (CORRECTION, corrected(lambda logs: logs.exp())),
    "tis": (
        {**CORRECTION, "truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.2},
        corrected(lambda logs: logs.exp().clamp(max=1.2)),
    ),
    "tis_both": (
        {
            **CORRECTION,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": 1.2,
            "truncated_importance_sampling_ratio_min": 0.9,
        },
        corrected(lambda logs: logs.exp().clamp(0.9, 1.2)),
    ),
    "tis_sequences": (
        {
            **CORRECTION,
            "sequence_level_importance_sampling": True,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": 1.2,
        },
        corrected(lambda logs: logs.sum().exp().clamp(max=1.2)),
    ),
    "mis": (
        {**CORRECTION, "truncated_importance_sampling_type": "mis", "truncated_importance_sampling_ratio": 1.2},
        corrected(lambda logs: zero_outside(logs.exp(), 0, 1.2)),
    ),
    "mis_sequences": (
        {
            **CORRECTION,
            "sequence_level_importance_sampling": True,
            "truncated_importance_sampling_type": "mis",
            "truncated_importance_sampling_ratio": 1.2,
        },
        corrected(lambda logs: zero_outside(logs.sum().exp(), 0, 1.2)),
    ),
    "icepop": (
        {
            **CORRECTION,
            "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": 1.2,
            "truncated_importance_sampling_ratio_min": 0.8,
        },
        corrected(lambda logs: zero_outside(logs.exp(), 0.8, 1.2)),
    ),
    "seq-mask-tis": (
        {
            **CORRECTION,
            "truncated_importance_sampling_type": "seq-mask-tis",
            "truncated_importance_sampling_ratio": 1.1,
            "truncated_importance_sampling_ratio_min": 0.9,
        },
        corrected(lambda logs: logs.exp() * bool(0.9 <= logs.mean().exp() <= 1.1)),
    ),
}


@pytest.mark.parametrize(("options", "loss_of"), OFF_POLICY.values(), ids=OFF_POLICY)
def test_off_policy_every_surrogate_is_its_papers_formula(
    options: dict[str, Any], loss_of: Callable[..., torch.Tensor]
) -> None:
    table = a_table(1, requires_grad=True)
    prev, engine = near(table, 2, 0.6), near(table, 3, 0.6)
    samples = [a_sample(each, REWARD[each], engine, prev=prev) for each in EPISODES]
    bounds = {"ratio_clip_min": 0.1, "ratio_clip_max": 0.3}
    loss, gradient, sums = estimated(table, samples, weighed(engine), **bounds, **options)
    truth = torch.stack(
        [
            weight
            * loss_of(
                token_logprobs(table, each), token_logprobs(prev, each), token_logprobs(engine, each), REWARD[each]
            )
            for each, weight in zip(EPISODES, weighed(engine), strict=True)
        ]
    ).sum()
    assert loss.item() == pytest.approx(truth.item(), abs=1e-6)
    torch.testing.assert_close(gradient, gradient_of(truth, table), atol=1e-6, rtol=0)
    # Otherwise the test would say nothing of what it is about.
    if "disable_ppo_ratio" not in options:
        assert sums.clipped_low > 0
        assert sums.clipped_high > 0
    if "ratio_clip_c" in options:
        assert sums.clipped_dual > 0
    if "truncated_importance_sampling_type" in options:
        assert 0 < sums.out_of_bounds < sums.tokens


def visits(table: Table) -> list[tuple[int, float]]:
    """How often an episode comes by each state, apart from the gradient."""
    first = table.detach()[PROMPT].softmax(-1)
    return [(PROMPT, 1.0), *((token, float(first[token])) for token in range(4))]


def state_kl(table: Table, reference: Table, visited: Table) -> torch.Tensor:
    """KL(policy || reference) of the next token, over the states that `visited` comes by."""
    log_p, log_q = table.log_softmax(-1), reference.log_softmax(-1)
    kls = (log_p.exp() * (log_p - log_q)).sum(-1)
    return sum((often * kls[state] for state, often in visits(visited)), torch.tensor(0.0))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_in_the_loss_has_the_kls_gradient(kind: str) -> None:
    table = a_table(1, requires_grad=True)
    reference = near(table, 2)
    samples = [a_sample(each, 0.0, table, reference=reference) for each in EPISODES]
    options = {"reference_policy_kl_penalty": 0.7, "reference_policy_kl_type": kind}
    loss, gradient, _ = estimated(table, samples, weighed(table), **options)
    truth = 0.7 * state_kl(table, reference, table)
    torch.testing.assert_close(gradient, gradient_of(truth, table), atol=1e-6, rtol=0)
    if kind == "k2":  # the one whose value is biased
        assert abs(loss.item() - truth.item()) > 1e-4
    else:
        assert loss.item() == pytest.approx(truth.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_off_policy_samples_give_the_kl_gradient_of_the_current_policy(kind: str) -> None:
    table = a_table(1, requires_grad=True)
    reference, older = near(table, 2), near(table, 3)
    samples = [a_sample(each, 0.0, older, reference=reference) for each in EPISODES]
    options = {"reference_policy_kl_penalty": 0.7, "reference_policy_kl_type": kind}
    truth = gradient_of(0.7 * state_kl(table, reference, older), table)
    weights = weighed(older)
    _, gradient, _ = estimated(table, samples, weights, **options, use_on_policy_kl_approximation=True)
    torch.testing.assert_close(gradient, truth, atol=1e-6, rtol=0)
    _, unweighed, _ = estimated(table, samples, weights, **options)
    assert (unweighed - truth).abs().max() > 1e-3


def test_the_entropy_bonus_has_the_entropys_gradient() -> None:
    table = a_table(1, requires_grad=True)
    samples = [a_sample(each, 0.0, table) for each in EPISODES]
    loss, gradient, sums = estimated(table, samples, weighed(table), entropy_bonus=0.7)
    logprobs = table.log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    truth = sum((often * entropies[state] for state, often in visits(table)), torch.tensor(0.0))
    assert loss.item() == pytest.approx(-0.7 * truth.item(), abs=1e-6)
    torch.testing.assert_close(-gradient, gradient_of(0.7 * truth, table), atol=1e-6, rtol=0)
    assert sums.entropy > 0


def test_the_kl_in_the_reward_has_the_gradient_of_the_whole_episodes_kl() -> None:
    table = a_table(1, requires_grad=True)
    reference = near(table, 2)
    groups = [
        Group(Task("t", "", ""), tuple(an_episode(each, table) for each in pair), ())
        for pair in itertools.product(EPISODES, repeat=2)
    ]
    loss_fn = LossFn(reference_policy_kl_penalty=0.7, reference_policy_kl_type="k1", use_kl_in_reward=True)
    logprobs = {each: a_sample(each, 0.0, table, reference=reference).reference_logprobs for each in EPISODES}
    samples = [
        replace(sample, reference_logprobs=logprobs[tuple(sample.token_ids[1:].tolist())])
        for sample in make_samples(groups)
    ]
    rloo = Grpo(normalize_rewards=False, use_leave_one_out_baseline=True)
    credited, metrics = credit(groups, samples, rloo, loss_fn)
    weights = [math.prod(weighed(table, pair)) / 2 for pair in itertools.product(EPISODES, repeat=2) for _ in pair]
    batch = in_one_batch(credited, weights)
    loss, _ = policy_loss(*forward(table, batch), batch, loss_fn)
    kl = sum(
        (
            probability(table, each) * (token_logprobs(table, each) - token_logprobs(reference, each)).sum()
            for each in EPISODES
        ),
        torch.tensor(0.0),
    )
    truth = gradient_of(expected_return(table) - 0.7 * kl, table)
    torch.testing.assert_close(-gradient_of(loss, table), truth, atol=1e-6, rtol=0)
    assert metrics["train:kl_penalty"] != 0


def an_episode(episode: tuple[int, ...], table: Table) -> Episode:
    sampled = completion(episode, token_logprobs(table, episode).tolist())
    return conversation(REWARD[episode], sampled, prompt=(0,), correct=False)


def estimated_over_groups(table: Table, rewards: dict[tuple[int, ...], float], size: int, grpo: Grpo) -> torch.Tensor:
    """The expected gradient over all groups of so many single-token episodes."""
    samples, weights = [], []
    for group in itertools.product(SINGLE_TOKENS, repeat=size):
        (found,) = advantages([[rewards[each] for each in group]], [[1] * size], grpo)
        samples += [a_sample(each, advantage, table) for each, advantage in zip(group, found, strict=True)]
        weights += [math.prod(weighed(table, group)) / size] * size
    return -estimated(table, samples, weights)[1]


def test_rloo_is_unbiased_and_a_group_mean_scales_it_by_n_minus_1_over_n() -> None:
    table = a_table(1, requires_grad=True)
    truth = gradient_of(expected_return(table, SINGLE_TOKENS), table)
    rloo = estimated_over_groups(table, REWARD, 3, Grpo(normalize_rewards=False, use_leave_one_out_baseline=True))
    torch.testing.assert_close(rloo, truth, atol=1e-6, rtol=0)
    plain = estimated_over_groups(table, REWARD, 3, Grpo(normalize_rewards=False, use_leave_one_out_baseline=False))
    torch.testing.assert_close(plain, truth * 2 / 3, atol=1e-6, rtol=0)


def test_maxrl_matches_the_first_terms_of_the_gradient_of_log_success() -> None:
    table = a_table(1, requires_grad=True)
    rewards = {each: float(each in [(1,), (3,)]) for each in SINGLE_TOKENS}
    success = probability(table, (1,)) + probability(table, (3,))
    maxrl = estimated_over_groups(table, rewards, 3, Grpo(adv_estimator={"name": "maxrl"}))  # type: ignore[arg-type]
    factor = (1 - (1 - success.item()) ** 2) / success.item()
    torch.testing.assert_close(maxrl, factor * gradient_of(success, table), atol=1e-6, rtol=0)
