"""Keys of NeMo RL's configurations: accepted where slurmkit has the feature, else refused with what to do instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurmkit.config.load import load_config
from slurmkit.config.nemo_rl import _ADVICE, advice_on
from slurmkit.config.schema import TrainConfig
from slurmkit.config.section import ValidationError
from slurmkit.config.source import parse_yaml
from slurmkit.config.validate import known_keys
from slurmkit.envs.environment import Task
from slurmkit.envs.tasks import hold_out
from slurmkit.errors import UserError
from tests.support.tiny_model import tiny_config

LIST = Path(__file__).with_name("nemo_rl_keys.yaml")
KEYS: dict[str, Any] = parse_yaml(LIST, LIST.read_text()).data
OURS = set(known_keys(TrainConfig))


def write(folder: Path, key: str, value: Any) -> Path:
    """A configuration that has this key and nothing else but what must be given."""
    data: dict[str, Any] = {"env": {"name": "arithmetic"}, "policy": {"model_name": "some/model"}}
    section = data
    *above, last = key.split(".")
    for name in above:
        section = section.setdefault(name, {})
    section[last] = value
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def refusal(folder: Path, key: str, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_config(write(folder, key, value))
    return str(caught.value)


def test_every_key_of_a_feature_that_slurmkit_has_is_accepted(tmp_path: Path) -> None:
    for key, value in KEYS["accepted"].items():
        load_config(write(tmp_path, key, value))


def test_every_other_key_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for key in KEYS["refused"]:
        [line] = refusal(tmp_path, key, 1).splitlines()
        assert line.startswith("unknown key "), key
        assert line.endswith(f": {advice_on(key, 1)}"), key


def test_advice_names_only_existing_keys_and_covers_no_slurmkit_key() -> None:
    assert not OURS & _ADVICE.keys()
    for advice in _ADVICE.values():
        named = re.findall(r"\b(?:grpo|loss_fn|policy|env|data|logger|cluster|checkpointing)\.[a-z_.]+[a-z_]", advice)
        assert not set(named) - OURS


def test_an_override_of_one_key_of_a_section_is_answered_for_that_key(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("env: {name: arithmetic}\npolicy: {model_name: some/model}\n")
    override = "policy.megatron_cfg.tensor_model_parallel_size=1"
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "train.yaml", ["cluster.gpus_per_node=1", override])
    assert str(caught.value) == (
        f"unknown key policy.megatron_cfg (command line: {override}): use policy.dtensor_cfg.tensor_parallel_size"
    )


def test_null_is_the_default_where_nemo_rl_writes_it(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        grpo={"async_grpo": None, "reward_shaping": {"overlong_buffer_penalty": None}},
        data={"validation": None},
    )
    assert config.grpo.async_grpo == TrainConfig.model_construct().grpo.async_grpo
    assert config.data.validation_sources["data.validation"].data_path is None
    soft = {"enabled": True, "overlong_buffer_length": 2, "max_response_length": 9, "overlong_buffer_penalty": None}
    with pytest.raises(ValidationError, match="the soft penalty needs overlong_buffer_penalty, which is null"):
        tiny_config(tmp_path, grpo={"reward_shaping": soft})


def test_the_estimator_s_own_keys_take_the_place_of_the_algorithm_s(tmp_path: Path) -> None:
    def both(**own: bool) -> tuple[bool, bool]:
        grpo = tiny_config(tmp_path, grpo={"normalize_rewards": False, "adv_estimator": own}).grpo
        return grpo.normalizes, grpo.leaves_one_out

    assert both() == (False, True)
    assert both(normalize_rewards=True, use_leave_one_out_baseline=False) == (True, False)


@pytest.mark.parametrize(("keys", "is_all"), [({}, True), ({"target_modules": ["q_proj"]}, False)])
def test_adapters_are_on_all_linear_layers_if_nothing_else_is_said(keys: dict[str, Any], is_all: bool) -> None:
    from slurmkit.config.model import LoraCfg

    assert LoraCfg(**keys).adapts_all_linear is is_all
    assert LoraCfg(**keys, match_all_linear=True).adapts_all_linear
    if is_all:
        with pytest.raises(ValidationError, match="match_all_linear false needs target_modules"):
            LoraCfg(**keys, match_all_linear=False)


def test_a_number_of_questions_can_be_held_out() -> None:
    tasks = [Task(str(number), str(number), "") for number in range(10)]
    for size, count in ((0.25, 2), (3, 3), (1, 1), (99, 10)):
        train, held_out = hold_out(tasks, size, seed=1)
        assert (len(train), len(held_out)) == (10 - count, count)
