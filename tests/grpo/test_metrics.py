"""What a run logs: every name documented, phases that add up, and the same in TensorBoard, however often resumed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from slurmkit.config.load import load_config
from slurmkit.config.metrics import computed
from slurmkit.errors import Failure
from slurmkit.grpo.metrics import RunLog, check_finite, whole_step
from slurmkit.grpo.throughput import Description, Gauge, Shape, peak_flops, shape_of
from slurmkit.rollout.episode import Episode
from tests.support.driver import TINY, Run
from tests.support.groups import completion, conversation
from tests.support.requirements import REPOSITORY
from tests.support.tiny_model import make_tiny_model, tiny_config


def documented() -> dict[str, str]:
    """Name and occasion of every row of the tables in docs/metrics.md."""
    rows = re.findall(
        r"^\| `([^`]+)` \|.*\| ([^|]*) \|$", (REPOSITORY / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
    assert len(rows) == len(dict(rows)), "a name stands there twice"
    return dict(rows)


def test_documented_metrics_and_the_metrics_of_a_run_are_the_same(finished: Run) -> None:
    found = {name for line in finished.lines for name in line if name not in ("step", "last_step")}
    patterns = {name: re.sub(r"<\w+>", r"\\w+", re.escape(name)) for name in documented()}
    unknown = {name for name in found if not any(re.fullmatch(pattern, name) for pattern in patterns.values())}
    assert not unknown
    always = {name for name, occasion in documented().items() if not occasion.startswith("if ")}
    assert not {name for name in always if not any(re.fullmatch(patterns[name], each) for each in found)}


def test_what_checkpoints_may_be_judged_by_is_what_a_step_has(finished: Run) -> None:
    names = set(computed(load_config(TINY, [])))
    assert any(names <= line.keys() for line in finished.lines)
    assert names <= documented().keys()


def test_the_seconds_of_a_steps_phases_add_up_to_the_step(finished: Run) -> None:
    phases = ("rollout", "update", "weights", "validation", "checkpoint", "other")
    for line in finished.lines[1:]:
        assert sum(line.get(f"time:{phase}", 0.0) for phase in phases) == pytest.approx(line["time:step"])
        assert 0 <= line["time:other"] < line["time:step"]
        assert line["time:checkpoint_wait"] <= line["time:checkpoint"]
    assert sum("time:checkpoint_write" in line for line in finished.lines) == 7  # the last ends after the last line


def test_seconds_inside_a_phase_are_not_counted_twice() -> None:
    metrics = {"time:update": 1.0, "time:forward": 0.5, "time:checkpoint": 0.25, "time:checkpoint_wait": 0.25}
    with whole_step(metrics):
        pass
    assert metrics["time:other"] == metrics["time:step"] - 1.25


def test_a_step_that_has_diverged_is_a_failure_that_names_the_figures() -> None:
    check_finite(7, {"train:loss": 0.1})
    message = "step 7 has diverged and is not saved: train:loss is nan, train:grad_norm is inf"
    with pytest.raises(Failure, match=message):
        check_finite(7, {"train:loss": float("nan"), "train:reward_mean": 1.0, "train:grad_norm": float("inf")})


def test_tensorboard_has_what_metrics_jsonl_has(finished: Run) -> None:
    events = EventAccumulator(str(finished.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = {name for line in finished.lines for name in line} - {"step", "last_step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        shown = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert [(line["step"], line[name]) for line in finished.lines if name in line] == shown


def test_steps_that_are_made_again_stand_in_tensorboard_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, logger={"tensorboard_enabled": True})
    for resume_after, steps, value in ((None, (1, 2), 9.0), (None, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)):
        with RunLog(tmp_path, config, last_step=8, resume_after=resume_after) as log:
            for step in steps:
                log.write(step, {"train:loss": value})
            if resume_after is None:
                log.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train:loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def episode(prompt: int, *lengths: int, new: Sequence[int] = ()) -> Episode:
    """Of so many replies of these lengths, with two tokens between."""
    replies = [completion((0,) * length, (-1.0,) * length) for length in lengths]
    return conversation(0.0, *replies, prompt=(0,) * prompt, added=(0, 0), new=new)


def test_rates_follow_nemo_rls_definitions_and_mfu_prime_rls(tmp_path: Path) -> None:
    groups: Any = [
        SimpleNamespace(episodes=(episode(10, 20), episode(10, 40))),
        SimpleNamespace(episodes=(episode(20),)),
    ]
    updates: Any = [SimpleNamespace(ranks=(((SimpleNamespace(lengths=(30, 50))),), (SimpleNamespace(lengths=(1,)),)))]
    times = {"time:step": 8.0, "time:rollout": 2.0, "time:update": 4.0, "time:logprobs": 1.0}
    config = tiny_config(tmp_path, cluster={"num_nodes": 2, "gpus_per_node": 0})
    shape = Shape(parameters=1000, layers=2, hidden_size=32)
    found = Gauge(config, Description(shape, "NVIDIA H100 80GB HBM3")).read(groups, updates, times, engines_busy=2.0)
    flops = sum(6 * 1000 * n + 12 * 2 * 32 * n * n for n in (30, 50, 1))
    assert found == pytest.approx(
        {
            "train:total_tokens": 100,
            "train:prompt_tokens_mean": 40 / 3,
            "train:prompt_tokens_max": 20,
            "train:completion_tokens_mean": 20,
            "train:completion_tokens_max": 40,
            "train:sequence_tokens_mean": 100 / 3,
            "train:sequence_tokens_max": 50,
            "perf:samples_per_sec_per_gpu": 3 / 8 / 2,
            "perf:tokens_per_sec_per_gpu": 100 / 8 / 2,
            "perf:generation_tokens_per_sec_per_gpu": 100 / 2 / 2,
            "perf:logprobs_tokens_per_sec_per_gpu": 100 / 1 / 2,
            "perf:policy_training_tokens_per_sec_per_gpu": 81 / 4 / 2,
            "perf:training_worker_group_tokens_per_sec_per_gpu": 81 / 5 / 2,
            "perf:trainer_idle": 2 / 8,
            "perf:engines_idle": 6 / 8,
            "perf:train_tflops_per_gpu": flops / 4 / 2 / 1e12,
            "perf:mfu": flops / 4 / 2 / 989e12,
        }
    )
    told = tiny_config(tmp_path, cluster={"gpus_per_node": 0, "peak_tflops_per_gpu": 2.0})
    known = Gauge(told, Description(shape, "CPU")).read(groups, updates, times, engines_busy=8.1)
    assert (known["perf:mfu"], known["perf:engines_idle"]) == (flops / 4 / 2e12, 0)
    unknown = Gauge(config, Description(shape, "CPU"))
    assert "perf:mfu" not in unknown.read(groups, updates, times, engines_busy=2.0)
    assert "perf:train_tflops_per_gpu" not in unknown.read(groups, [], times, engines_busy=2.0)
    assert unknown.read([], [], times, engines_busy=2.0) == {}
    asynchronous = {"async_grpo": {"enabled": True}}
    config = tiny_config(tmp_path, grpo=asynchronous, loss_fn={"use_importance_sampling_correction": True})
    sampling = Gauge(config, Description(shape, "CPU")).read(groups, updates, times, engines_busy=2.0)
    assert sampling["perf:generation_tokens_per_sec_per_gpu"] == 100 / 8


def test_a_gpus_peak_is_known_by_its_name() -> None:
    assert [peak_flops(name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "CPU")] == [
        *(989e12, 312e12, 756e12),
        None,
    ]


def test_parameters_count_where_a_token_is_multiplied_with_them(tmp_path: Path) -> None:
    sizes = {
        **{"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16},
        **{"num_key_value_heads": 2, "intermediate_size": 48},
    }
    attention = 32 * 64 * 2 + 32 * 32 * 2
    for tied in (True, False):
        shape = shape_of(Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=tied)))
        assert shape == Shape(3 * (attention + 3 * 32 * 48) + 100 * 32, layers=3, hidden_size=32)
    with torch.device("meta"):
        mixture = Qwen3MoeConfig(**sizes, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
        shape = shape_of(Qwen3MoeForCausalLM(mixture))
    assert shape.parameters == 3 * (attention + 8 * 32 + 2 * 3 * 32 * 24) + 100 * 32
    tiny = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    assert shape_of(tiny).layers == tiny.config.num_hidden_layers
