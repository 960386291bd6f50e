"""slurmkit bench: real measurements of next to nothing, and what is made of the figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parts import SLURMKIT

from slurmkit.bench import asynchronous, baseline, growth, sampling, side_by_side
from slurmkit.bench.child import measured
from slurmkit.bench.machine import WatchedTree
from slurmkit.bench.shapes import SHAPES
from slurmkit.bench.slow_episodes import Settings, Times
from slurmkit.envs.environment import Task
from slurmkit.errors import UserError

# A Python with TRL, for those who have one: then the comparison is run whole.
TRL_PYTHON = os.environ.get("TEST_TRL_PYTHON")


def bench(here: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [SLURMKIT, "bench", *arguments], cwd=here, env=environment, capture_output=True, text=True, timeout=300
    )


def test_fake_data_measures_the_trainer_and_keeps_what_a_later_run_is_compared_with(tmp_path: Path) -> None:
    words = ["--shape", "tiny", "--seq-length", "64", "--sequences", "2", "--steps", "3", "--threads", "1"]
    first = bench(tmp_path, "train", "--fake-data", *words, "--json", "--save-baseline", "kept/small.json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert json.loads((tmp_path / "kept/small.json").read_text()) == result
    assert result["benchmark"] == "fake-data"
    assert result["settings"] | {"seq_length": 64, "sequences": 2, "seed": 0, "threads": 1} == result["settings"]
    assert {"cpu", "cores", "memory_mib"} <= result["machine"].keys()
    assert {"python", "slurmkit", "torch", "transformers"} <= result["versions"].keys()
    figures = result["figures"]
    assert len(figures["all_step_seconds"]) == 3
    step = sum(figures["all_step_seconds"][1:]) / 2
    assert figures["step_seconds"] == pytest.approx(step)
    assert figures["tokens_per_second"] == pytest.approx(2 * 64 / step)
    # Attention within a sequence, of which there are two in a micro-batch.
    tiny = SHAPES["tiny"]
    layer = tiny.hidden_size * (tiny.head_dim * (2 * 2 + 2 * 2) + 3 * tiny.intermediate_size)
    parameters = 2 * layer + tiny.vocab_size * tiny.hidden_size
    assert figures["flops_per_token"] == 6 * parameters + 12 * 2 * tiny.hidden_size * 32
    assert figures["mfu"] == pytest.approx(2 * 64 / step * figures["flops_per_token"] / figures["peak_flops"])
    assert figures["peak_memory_mib"] > figures["loaded_memory_mib"] > 50


def test_a_turn_of_a_conversation_costs_the_driver_less_than_five_milliseconds_of_processor_time() -> None:
    settings = {"groups": 4, "generations": 4, "rounds": 1}
    found = measured("rollout", settings)
    assert found["settings"] == found["settings"] | settings | {"turns": 6, "tools": 27}
    figures = found["figures"]
    assert 0 < figures["turn_cpu_ms"] < 5
    assert len(figures["all_turn_ms"]) == 2
    assert figures["turn_ms"] == figures["all_turn_ms"][1]
    assert figures["sequence_tokens"] > figures["prompt_tokens"] + 6 * 2 * 30


@pytest.mark.parametrize("side", sampling.SIDES)
@pytest.mark.parametrize("workload", sampling.WORKLOADS)
def test_sampling_is_measured_with_each_engine_and_with_transformers(side: str, workload: str) -> None:
    sizes = {"batch": 4, "prompt_tokens": 16, "new_tokens": 8, "rounds": 2, "threads": 1}
    settings = {"shape": "0.4m", "side": side, "workload": workload, **sizes}
    found = measured("generate", settings)
    assert found["settings"] == found["settings"] | settings
    figures = found["figures"]
    assert len(figures["all_tokens_per_second"]) == 3
    assert figures["tokens_per_second"] == pytest.approx(sum(figures["all_tokens_per_second"][1:]) / 2)
    assert 300_000 < figures["parameters"] < 500_000


def test_a_transfer_of_weights_is_measured_beside_a_plain_copy() -> None:
    figures = measured("sync", {"shape": "0.4m", "side": "torch", "rounds": 2, "threads": 1})["figures"]
    tiny = SHAPES["0.4m"]
    assert figures["bytes"] > 4 * 2 * tiny.vocab_size * tiny.hidden_size
    whole = figures["share_seconds"] + figures["load_seconds"]
    assert figures["bytes_per_second"] == pytest.approx(figures["bytes"] / whole)
    assert figures["ratio_to_copy"] == pytest.approx(whole / figures["copy_seconds"])


def test_engines_are_compared_shape_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(module: str, settings: dict[str, Any]) -> dict[str, Any]:
        rate = {"transformers": 100.0, "torch": 150.0, "vllm": 250.0}[settings["side"]]
        return {"settings": settings, "figures": {"tokens_per_second": rate, "start_seconds": 1.0}}

    monkeypatch.setattr(sampling, "measured", measured)
    said = list[str]()
    result = sampling.compare(["1m", "100m"], {"batch": 4}, said.append)
    assert [run["settings"]["shape"] for run in result["runs"]] == (["1m"] * 3 + ["100m"] * 3) * 2
    assert [run["settings"]["workload"] for run in result["runs"]] == ["even"] * 6 + ["rollouts"] * 6
    assert all(run["settings"]["batch"] == 4 for run in result["runs"])
    assert result["figures"]["1m, even"]["ratio_to_transformers"] == {"torch": 1.5, "vllm": 2.5}
    assert "| 100m, rollouts | vllm | 250 | 2.50 | 1.0 |" in list(sampling.table(result["figures"]))
    assert len(said) == 12
    with pytest.raises(UserError, match="--shape 7b: there is no such shape"):
        sampling.transfers(["7b"], {}, said.append)


def test_an_asynchronous_run_in_a_slow_environment_tells_its_rate_its_ages_and_who_waited() -> None:
    settings = {"age": 1, "steps": 3, "prompts": 2, "generations": 2, "median_seconds": 0.05}
    found = measured("slow_episodes", settings)
    assert found["settings"] == found["settings"] | settings
    figures = found["figures"]
    assert figures["age_max"] == 1 > figures["age_mean"] > 0
    assert figures["tokens_per_second"] > 0
    assert all(0 <= figures[f"{who}_idle"] <= 1 for who in ("trainer", "engines"))


def test_asynchronous_runs_are_compared_with_synchronous_ones_of_the_same_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(module: str, settings: dict[str, Any]) -> dict[str, Any]:
        names = ("tokens_per_second", "step_seconds", "trainer_idle", "engines_idle", "age_mean", "age_max")
        figures = {**dict.fromkeys((*names, "first_reward", "last_reward"), 0.5), "tokens_per_second": 100.0}
        figures["tokens_per_second"] *= (1 + settings["age"]) * settings["seed"]
        return {"settings": settings, "figures": figures}

    monkeypatch.setattr(asynchronous, "measured", measured)
    result = asynchronous.compare([2], [1, 3], {"steps": 4}, lambda line: None)
    assert [(run["settings"]["seed"], run["settings"]["age"]) for run in result["runs"]] == [
        *((1, 0), (1, 2), (3, 0), (3, 2)),
    ]
    assert result["figures"]["age 2"]["tokens_per_second"] == 600
    assert result["figures"]["age 2"]["ratio_to_synchronous"] == 3
    assert "| age 2 | 600 | 3.00 | 0.50 | 50% | 50% | 0.50 | 0.50 to 0.50 |" in list(
        asynchronous.table(result["figures"])
    )


def test_an_episode_takes_as_long_in_every_run_of_its_seed() -> None:
    task, other = Task("a", "", ""), Task("b", "", "")
    asked = [task, other, task, other]
    first, again, another = (
        [times.of_next(each) for each in asked]
        for times in (Times(Settings(0, seed=1)), Times(Settings(2, seed=1)), Times(Settings(0, seed=2)))
    )
    assert first == again
    assert len({*first, *another}) == 8


def test_growth_is_what_depends_on_vocabulary_and_tokens_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of memory: 300 MiB, weights by the vocabulary, activations by the tokens, and 3 bytes by both."""

    def measured(module: str, settings: dict[str, Any]) -> dict[str, Any]:
        assert (module, settings["micro_batches"]) == ("fake_data", 1)
        size, tokens = settings["vocab_size"], settings.get("seq_length", 1024)
        peak = 300 + 16 * 256 * size / 2**20 + tokens / 10 + 3 * size * tokens / 2**20
        return {"settings": {"shape": "small", "seq_length": tokens}, "figures": {"peak_memory_mib": peak}}

    monkeypatch.setattr(growth, "measured", measured)
    result = growth.measure([151_936, 32_768], {"shape": "small"}, lambda line: None)
    figures = result["figures"]
    assert [(row["vocabulary"], row["tokens"]) for row in figures["peaks"]] == [
        (32_768, 512),
        (32_768, 1024),
        (151_936, 512),
        (151_936, 1024),
    ]
    grown = 3 * (151_936 - 32_768) * 512 / 2**20
    assert figures["growth_with_vocabulary_and_tokens_mib"] == pytest.approx(grown)
    assert figures["such_a_tensor_would_grow_mib"] == pytest.approx(grown * 4 / 3)
    assert figures["growth_beyond_weights_mib"] == pytest.approx(2 * grown)
    assert result["settings"]["vocab_size"] == [32_768, 151_936]


def test_the_driver_s_part_of_a_step_is_told_by_its_parts(tmp_path: Path) -> None:
    words = ["--ranks", "3", "--prompts", "4", "--generations", "4", "--tokens", "8", "--steps", "2"]
    done = bench(tmp_path, "driver", *words, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    parts = ("rollout", "samples", "credit", "packing", "update", "weights", "gauge", "log")
    assert all(figures[f"{part}_ms"] > 0 for part in parts)
    assert sum(figures[f"{part}_ms"] for part in parts) <= 1.5 * figures["step_ms"]
    assert len(figures["all_step_ms"]) == 3


def test_both_sides_start_from_one_model_and_every_phase_is_told(tmp_path: Path) -> None:
    settings = side_by_side.Settings(("tiny",), (1,), 3, 2, 8, 16, 16, 4.0, threads=1)
    trl = Path(TRL_PYTHON) if TRL_PYTHON else None
    affinity = os.sched_getaffinity(0)
    try:
        result = side_by_side.measure(settings, trl, tmp_path / "cache", tmp_path / "runs", lambda line: None)
    finally:
        os.sched_setaffinity(0, affinity)
    sides = ["slurmkit", *(["trl"] if trl else [])]
    assert [run["side"] for run in result["runs"]] == sides
    for side in sides:
        figures = result["figures"]["tiny"][side]
        assert figures["tokens_per_second"] > 0
        assert figures["step"] >= figures["generation"] > 0
        assert figures["peak_memory_mib"] > 100
        assert set(side_by_side.PHASES) <= figures.keys()
    for run in result["runs"]:
        assert len(run["steps"]) == 3
        assert all(16 <= step["completion_tokens"] <= 16 * 16 for step in run["steps"])
    assert ("ratio" in result["figures"]["tiny"]) == bool(trl)
    header, _, *rows = side_by_side.table(result["figures"])
    assert all(row.count("|") == header.count("|") for row in rows)
    assert len(rows) == len(sides) + bool(trl)


def a_run(side: str, *seconds: float, reward: float = 0.5) -> dict[str, Any]:
    """100 tokens in each step."""
    steps = [
        {"step": each, "generation": each / 2, "update": each / 4, "completion_tokens": 100.0, "reward_mean": reward}
        for each in seconds
    ]
    memory = {"peak_memory_mib": 400.0, "largest_process_mib": 200.0 if side == "trl" else 100.0}
    return {"model": "tiny", "seed": 1, "side": side, "steps": steps, **memory}


def test_a_comparison_leaves_out_the_first_step_and_divides_ours_by_theirs() -> None:
    runs = [a_run("slurmkit", 99, 1, 1), a_run("trl", 50, 3, 5), a_run("slurmkit", 99, 2, 4, reward=0.7)]
    figures = side_by_side.summary(runs)["tiny"]
    assert figures["slurmkit"]["tokens_per_second"] == 400 / 8
    assert figures["slurmkit"]["step"] == 2.0
    assert figures["slurmkit"]["logprobs"] == 0.0
    assert figures["slurmkit"]["last_reward"] == pytest.approx(0.6)
    assert figures["trl"]["tokens_per_second"] == 200 / 8
    assert figures["ratio"] == {"tokens_per_second": 2, "step": 0.5, "peak_memory_mib": 1, "largest_process_mib": 0.5}


def test_a_tree_s_memory_holds_that_of_grandchildren() -> None:
    grandchild = "import time; held = bytearray(200 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(2)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen([sys.executable, "-c", code]) as child, WatchedTree(child.pid) as watched:
        child.wait(60)
    assert 200 < watched.largest_process_mib < 300
    assert watched.peak_mib > 200


def test_a_figure_is_called_worse_beyond_one_percent_of_memory_or_fifteen_of_throughput() -> None:
    def result(memory: float, throughput: float, seed: int = 0) -> dict[str, Any]:
        figures = {"tiny": {"peak_memory_mib": memory}, "tokens_per_second": throughput, "mfu": 0.1}
        return {"benchmark": "fake-data", "settings": {"seed": seed}, "figures": figures}

    def verdicts(memory: float, throughput: float) -> list[str]:
        return [line.split()[0] for line in baseline.compare(result(memory, throughput), result(100, 1000))]

    assert verdicts(100.9, 860) == ["as", "as"]
    assert verdicts(101.1, 840) == ["worse", "worse"]
    assert verdicts(98, 1200) == ["better", "better"]
    (first, *_) = baseline.compare(result(100, 1000, seed=3), result(100, 1000))
    assert first == "differs    settings: seed 3, was 0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--fake-data", "--shape", "qwen3"],
            "--shape qwen3: there is no such shape; there are tiny, 0.4m, 1m, small",
        ),
        (["--fake-data", "--seq-length", "10", "--sequences", "3"], "--seq-length 10 cannot be 3 equal sequences"),
        (["--fake-data", "--vocab-sizes", "512"], "--vocab-sizes 512: give two or more"),
        (["--fake-data", "--models", "0.4M"], "--models is for a measurement beside TRL: give it without --fake-data"),
        (["--shape", "tiny"], "--shape is for a measurement on fake data: give it with --fake-data"),
        (["--models", "1T"], "--models 1T: there is no such model; there are tiny, 0.4M, 20M"),
        (["--micro-batch", "48"], "--micro-batch 48 must divide the 128 completions of a step"),
        (["--micro-batch", "4"], "hold whole groups of 8"),
        (["--trl-python", "/nowhere/python"], "--trl-python /nowhere/python: No such file or directory"),
        (["--trl-python", sys.executable], "it cannot import trl: ModuleNotFoundError: No module named 'trl'"),
        (["--fake-data", "--compare", "nowhere.json"], "--compare nowhere.json: no baseline: "),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_measured(words: list[str], message: str, tmp_path: Path) -> None:
    done = bench(tmp_path, "train", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_workplace_assistant_s_episodes_are_counted_and_earn_what_their_own_calls_do() -> None:
    found = measured("workplace", {"episodes": 60, "tasks": 28})
    figures = found["figures"]
    assert (figures["episodes"], len(figures["memory_mib"])) == (60, 11)
    assert figures["reward_mean"] == 1.0
    assert 3 <= figures["calls_per_episode"] <= 6
    assert 0 < figures["slowest_episodes_per_second"] <= figures["episodes_per_second"]
    assert figures["memory_growth_mib"] == figures["memory_mib"][-1] - figures["memory_mib"][0]
