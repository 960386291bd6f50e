"""The configuration loader: composition, overrides, origins, and one message for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurmkit.config.load import load_config
from slurmkit.config.source import read_yaml
from slurmkit.config.yaml12 import parse_value
from slurmkit.errors import UserError

BASE = """\
env: {name: arithmetic}
policy:
  from_scratch: {hidden_size: 64}
  train_global_batch_size: 64
grpo:
  num_prompts_per_step: 8
  num_generations_per_prompt: 8
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base file.yaml"
    path.write_text(BASE)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_child_file_changes_its_parent_key_by_key(base: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("defaults: base file.yaml\ngrpo: {seed: 7}\n")
    config = load_config(child)
    assert (config.grpo.seed, config.grpo.num_prompts_per_step) == (7, 8)


def test_files_that_build_on_each_other_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: b.yaml\n")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\n")
    assert "a.yaml -> " in refusal(tmp_path / "a.yaml")


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_override_sets_a_key_that_the_file_does_not_mention(base: Path, prefix: str) -> None:
    assert load_config(base, [f"{prefix}grpo.max_num_steps=3"]).grpo.max_num_steps == 3


def test_the_last_override_of_a_key_wins(base: Path) -> None:
    assert load_config(base, ["grpo.seed=1", "++grpo.seed=2"]).grpo.seed == 2


def test_a_removed_key_has_its_default_again(base: Path) -> None:
    assert load_config(base, ["~policy.from_scratch.hidden_size"]).policy.from_scratch.hidden_size == 128


def test_quoted_values_reach_the_configuration_without_their_quotes(base: Path) -> None:
    config = load_config(base, ["logger.wandb.project='a, b (c)'"])
    assert config.logger.wandb.project == "a, b (c)"


def test_interpolations_and_nemo_rl_resolvers_are_computed(base: Path) -> None:
    config = load_config(base, ["policy.train_global_batch_size=${mul:8,8}", "grpo.seed=${grpo.num_prompts_per_step}"])
    assert config.policy.train_global_batch_size == 64
    assert config.grpo.seed == 8


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("${.num_prompts_per_step}", 8),
        ("${grpo.val_period}", 3),
        ("${.${oc.env:SK_WHICH}}", 3),
        ("${grpo.${oc.env:SK_WHICH}}", 3),
        ("${${oc.env:SK_FIRST}.val_period}", 3),
        ("${grpo[val_period]}", 3),
        ("${mul:${grpo.val_period},${policy.train_global_batch_size}}", 192),
        ("${oc.select:grpo.nothing,7}", 7),
        ("${oc.decode:${oc.env:SK_SEED}}", 5),
    ],
)
def test_an_interpolation_finds_what_it_speaks_of_however_it_is_written(
    base: Path, monkeypatch: pytest.MonkeyPatch, text: str, seed: int
) -> None:
    for name, value in {"WHICH": "val_period", "FIRST": "grpo", "SEED": "4"}.items():
        monkeypatch.setenv(f"SK_{name}", value)
    base.with_name("child.yaml").write_text(f"defaults: {base.name}\ngrpo: {{val_period: 3, seed: '{text}'}}\n")
    load_config(base.with_name("child.yaml"))
    monkeypatch.setenv("SK_SEED", "5")
    assert load_config(base.with_name("child.yaml")).grpo.seed == seed


def test_config_dir_is_the_folder_of_the_file(base: Path) -> None:
    config = load_config(base, ["checkpointing.checkpoint_dir=${config_dir:}/out"])
    assert config.checkpointing.checkpoint_dir == f"{base.parent}/out"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("grpo.num_promts_per_step=4", "grpo.num_prompts_per_step"),
        ("++grpo.lr=1", "policy.optimizer.kwargs.lr"),
        ("policy.generation.temprature=1", "policy.generation.temperature"),
        ("checkpoint_dir=x", "checkpointing.checkpoint_dir"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(base: Path, override: str, nearest: str) -> None:
    message = refusal(base, override)
    assert f"unknown key {override.lstrip('+').partition('=')[0]} (command line: {override})" in message
    assert message.endswith(f"the nearest known key is {nearest}")


def test_an_unknown_key_in_a_file_is_refused_with_its_line(base: Path) -> None:
    base.write_text(BASE + "  num_step: 3\n")
    assert f"unknown key grpo.num_step ({base}:8)" in refusal(base)


def test_what_an_override_replaced_is_not_blamed_on_the_file(base: Path) -> None:
    override = "policy.from_scratch={hidden_size: wide}"
    assert f"hidden_size: should be a valid integer, not 'wide' (command line: {override})" in refusal(base, override)


def test_all_problems_are_told_at_once(base: Path) -> None:
    message = refusal(base, "grpo.seed=x", "env.name=foo", "bar=1")
    assert len(message.splitlines()) == 3
    assert "grpo.seed: should be a valid integer, not 'x' (command line: grpo.seed=x)" in message
    assert "env.name: should be 'arithmetic', 'math', 'workplace' or 'gym', not 'foo'" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.seed", "not Hydra's key=value"),
        ("grpo.seed=1,2", "is a sweep"),
        ("logger.wandb.name=exp(1)", "not Hydra's key=value"),
        ("grpo.seed=${nowhere}", "nowhere"),
        ("~grpo.seed", "removes a key that the configuration does not set"),
        ("grpo.seed=???", "grpo.seed must be given"),
        ("grpo=3", "grpo: should be a valid dictionary"),
        ("grpo.num_prompts_per_step=7", "policy.train_global_batch_size 64 must divide"),
    ],
)
def test_a_bad_override_is_refused_in_its_own_words(base: Path, override: str, message: str) -> None:
    assert message in refusal(base, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [", ":2: not valid YAML"),
        ("a: 1\na: 2\n", ":2: not valid YAML: the key 'a' stands twice, first in line 1"),
        ("- 1\n", "must hold keys and values, found list"),
        ("a: &x {b: [*x]}\n", "an anchor stands inside itself"),
        ("1: x\n", ":1: not valid YAML: the key 1 must be text"),
        ("a: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4:00:00", "4:00:00"),
        ("1e-3", 0.001),
        ("5.0e-4", 0.0005),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("2026-11-22", "2026-11-22"),
        ("", None),
        ("~", None),
        ("~/data", "~/data"),
        ("node[1-4]", "node[1-4]"),
    ],
)
def test_a_scalar_means_what_a_job_file_means_by_it(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)
