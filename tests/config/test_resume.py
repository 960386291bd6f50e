"""Which changes of a configuration a run survives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slurmkit.config.resume import MAY_DIFFER, differences
from slurmkit.config.schema import TrainConfig
from slurmkit.config.validate import known_keys
from slurmkit.config.yaml12 import parse_value

BASE: dict[str, Any] = {"env": {"name": "arithmetic"}, "policy": {"from_scratch": {}}}


def dump(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(BASE))
    for dotted, value in changes.items():
        *sections, last = dotted.split("__")
        part = data
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    return TrainConfig.model_validate(data).model_dump()


@pytest.mark.parametrize(
    "change",
    [
        {"cluster__num_nodes": 4},
        {"cluster__call_timeout_seconds": 5.0},
        {"logger__wandb__project": "other"},
        {"checkpointing__keep_top_k": None},
        {"grpo__max_num_steps": 7},
        {"grpo__val_period": 0},
        {"env__timeout_seconds": 3.0},
        {"policy__generation__max_batch_size": 2},
        {"policy__train_micro_batch_size": 1},
    ],
)
def test_where_how_long_and_how_fast_may_change(change: dict[str, Any]) -> None:
    assert differences(dump(), dump(**change)) == []


def test_what_changes_the_training_is_named_with_both_values() -> None:
    new = dump(grpo__seed=7, policy__optimizer__kwargs__betas=(0.9, 0.95), cluster__num_nodes=2)
    assert differences(dump(), new) == [
        ("grpo.seed", 42, 7),
        ("policy.optimizer.kwargs.betas", (0.9, 0.999), (0.9, 0.95)),
    ]
    old = dump(policy__from_scratch=None, policy__model_name="/m")
    found = {key: (before, now) for key, before, now in differences(old, dump())}
    assert found["policy.model_name"] == ("/m", None)
    assert found["policy.from_scratch"][0] is None


def test_a_dump_survives_json_and_keys_new_in_a_release_are_no_difference() -> None:
    old = parse_value(json.dumps(dump()))
    assert differences(old, dump()) == []
    del old["grpo"]["normalize_rewards"]
    old["grpo"]["gone"] = 1
    assert differences(old, dump()) == []


def test_every_key_that_may_differ_is_one_of_the_schema_s() -> None:
    assert set(known_keys(TrainConfig)) >= MAY_DIFFER
