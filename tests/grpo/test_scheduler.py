"""The learning rate follows from the training step, as NeMo RL's schedulers have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from slurmkit.config.model import SchedulerPart
from slurmkit.config.section import ValidationError
from slurmkit.grpo.optimizer import LearningRate, clip_gradients
from tests.support.tiny_model import tiny_config

PREFIX = "torch.optim.lr_scheduler."
WARM_UP: list[dict[str, Any]] = [
    {"name": PREFIX + "LinearLR", "kwargs": {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 5}},
    {"name": PREFIX + "CosineAnnealingLR", "kwargs": {"T_max": 10, "eta_min": 0.01}},
    {"milestones": [5]},
]


def rate(parts: list[dict[str, Any]] | None, base: float = 1.0) -> LearningRate:
    return LearningRate(base, None if parts is None else [SchedulerPart.model_validate(part) for part in parts])


def test_learning_rate_equals_torch_schedulers_stepped_once_per_step() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, 0.01)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [5])
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    schedule = rate(WARM_UP)
    assert [schedule.at(step) for step in range(1, 21)] == expected
    assert expected[0] == pytest.approx(0.1)
    assert max(expected) == 1.0


def test_a_resumed_run_has_the_learning_rates_of_an_uninterrupted_one() -> None:
    whole = rate(WARM_UP)
    expected = [whole.at(step) for step in range(1, 15)]
    assert [rate(WARM_UP).at(step) for step in range(1, 15)] == expected
    # A step without an update moves on, and looking twice does not.
    assert [whole.at(9), whole.at(9), whole.at(3)] == [expected[8], expected[8], expected[2]]


def test_without_schedulers_the_learning_rate_stays() -> None:
    assert [rate(None, base=3e-4).at(step) for step in (1, 1000)] == [3e-4, 3e-4]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"name": PREFIX + "LinearLr"}], "name 'torch.optim.lr_scheduler.LinearLr' is no scheduler that is known"),
        ([{"name": PREFIX + "LinearLR", "kwargs": {"total_iter": 5}}], r"kwargs \['total_iter'\]: .* takes"),
        ([{"name": PREFIX + "CosineAnnealingLR"}], "kwargs: .*CosineAnnealingLR needs T_max"),
        ([{"kwargs": {"T_max": 3}}], "give either a scheduler's name"),
        (WARM_UP[:2], r"has 2 schedulers and the milestones \[\]: it needs one milestone fewer"),
        ([*WARM_UP[:2], {"milestones": [5, 3]}], r"the milestones \[5, 3\]"),
    ],
)
def test_schedulers_that_cannot_be_are_refused(parts: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(tmp_path, policy={"scheduler": parts})
    assert tiny_config(tmp_path, policy={"scheduler": WARM_UP}).policy.scheduler is not None


@pytest.mark.parametrize(("limit", "scale"), [(None, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_gradients_are_scaled_down_to_the_limit_if_there_is_one(limit: float | None, scale: float) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, -4.0])
        assert clip_gradients([parameter], limit) == pytest.approx(5.0)
        assert parameter.grad.tolist() == pytest.approx([3.0 * scale, -4.0 * scale], rel=1e-5)
    finally:
        distributed.destroy_process_group()
