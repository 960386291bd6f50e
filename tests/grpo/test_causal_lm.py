"""What may be trained: any causal language model, one with code of its own where that is allowed by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from slurmkit.config.schema import TrainConfig
from slurmkit.errors import UserError
from slurmkit.grpo.causal_lm import check_model
from tests.support.policy_ranks import Work, run_ranks
from tests.support.small_models import make_model, tiny_llama
from tests.support.tiny_model import tiny_config

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def config(path: Path, **policy: Any) -> TrainConfig:
    return tiny_config(path.parent, policy={"model_name": str(path), "from_scratch": None, **policy})


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose modeling file lies beside its weights."""
    path = tiny_llama(tmp_path / "own-model")
    (path / "modeling_own.py").write_text(CODE)
    shape = json.loads((path / "config.json").read_text())
    shape |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    }
    (path / "config.json").write_text(json.dumps(shape))
    return path


def test_a_model_with_remote_code_is_refused_unless_allowed_by_name(own_code: Path) -> None:
    with pytest.raises(UserError, match=rf"brings code of its own.* policy.allow_remote_code: \[{own_code}\]"):
        check_model(own_code, config(own_code, allow_remote_code=["another/model"]))
    check_model(own_code, config(own_code, allow_remote_code=[str(own_code)]))


@pytest.mark.parametrize(("length", "is_told"), [(32, False), (33, True)])
def test_lengths_for_which_engine_and_policy_differ_are_reported(
    tmp_path: Path, length: int, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    path = tiny_llama(tmp_path / "model", max_position_embeddings=32, rope_parameters=rope)
    check_model(path, config(path, max_total_sequence_length=length))
    assert ("follow the length beyond 32 tokens" in capsys.readouterr().out) == is_told


def test_a_stop_token_outside_the_vocabulary_is_refused_by_its_id(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    with pytest.raises(UserError, match=r"stop_token_ids \[70000\]: .*/model has the tokens 0 to \d+ "):
        check_model(path, config(path, generation={"stop_token_ids": [3, 70000]}))
    check_model(path, config(path, generation={"stop_token_ids": [3]}))


def test_a_model_with_remote_code_trains_on_two_ranks_and_keeps_its_code(own_code: Path, tmp_path: Path) -> None:
    work = Work(tmp_path / "two", own_code, {"allow_remote_code": [str(own_code)]})
    found = run_ranks(2, work)
    assert found["norms"][0] > 0
    opened = AutoModelForCausalLM.from_pretrained(work.saved / "model", trust_remote_code=True)
    assert type(opened).__name__ == "OwnModel"


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    shape = T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, decoder_start_token_id=0)
    T5ForConditionalGeneration(shape).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=r"t5 is no causal language model: .*T5Config"):
        check_model(tmp_path / "t5", config(tmp_path / "t5"))


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model_type": "no_such"}'])
def test_a_folder_that_holds_no_model_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    if content is not None:
        (path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"policy.model_name: transformers cannot open .*folder: "):
        check_model(path, config(path))


def test_the_frozen_reference_scores_alike_after_updates_and_a_resume(
    tmp_path: Path,
) -> None:
    path = make_model(tmp_path / "model", AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "l")).config)
    kl = {"reference_policy_kl_penalty": 0.01}
    both = ("policy", "reference")
    fresh = run_ranks(1, Work(tmp_path / "fresh", path, score=("policy",), rounds=()))
    first = Work(tmp_path / "first", path, {}, kl, starting_path=path, score=both, reference=True)
    moved = run_ranks(2, first)
    assert moved["scores"]["reference"].equal(fresh["scores"]["policy"])
    assert (moved["scores"]["policy"] - fresh["scores"]["policy"]).abs().max() > 1e-2
    on = Work(
        tmp_path / "on",
        first.saved / "model",
        {},
        kl,
        starting_path=path,
        checkpoint=first.saved,
        first=2,
        score=both,
        reference=True,
    )
    assert run_ranks(1, on)["scores"]["reference"].equal(fresh["scores"]["policy"])
