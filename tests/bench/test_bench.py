"""slurmkit bench: real measurements of next to nothing, and what is made of the figures."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slurmkit.bench import asynchronous, baseline, equal_work, forced, growth, sampling, side_by_side
from slurmkit.bench.child import measured
from slurmkit.bench.machine import WatchedTree
from slurmkit.bench.shapes import SHAPES
from slurmkit.bench.slow_episodes import Settings, Times
from slurmkit.envs.environment import Task
from slurmkit.errors import UserError
from tests.support.requirements import SLURMKIT

MARKS = {("vllm", "even"): pytest.mark.vllm, ("vllm", "rollouts"): (pytest.mark.vllm, pytest.mark.nightly)}
# A Python with TRL, for those who have one: then the comparison is run whole.
TRL_PYTHON = os.environ.get("TEST_TRL_PYTHON")


def bench(here: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [SLURMKIT, "bench", *arguments], cwd=here, env=environment, capture_output=True, text=True, timeout=300
    )


def test_fake_data_measures_the_trainer_and_saves_a_baseline(tmp_path: Path) -> None:
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


def test_a_conversation_turn_costs_the_driver_under_5_ms_of_cpu_time() -> None:
    settings = {"groups": 4, "generations": 4, "rounds": 1}
    found = measured("rollout", settings)
    assert found["settings"] == found["settings"] | settings | {"turns": 6, "tools": 27}
    figures = found["figures"]
    assert 0 < figures["turn_cpu_ms"] < 5
    assert len(figures["all_turn_ms"]) == 2
    assert figures["turn_ms"] == figures["all_turn_ms"][1]
    assert figures["sequence_tokens"] > figures["prompt_tokens"] + 6 * 2 * 30


@pytest.mark.parametrize(
    ("side", "workload"),
    [
        pytest.param(side, workload, marks=MARKS.get((side, workload), ()))
        for side in sampling.SIDES
        for workload in sampling.WORKLOADS
    ],
)
def test_sampling_is_measured_with_each_engine_and_with_transformers(side: str, workload: str) -> None:
    sizes = {"batch": 4, "prompt_tokens": 16, "new_tokens": 8, "rounds": 2, "threads": 1}
    settings = {"shape": "0.4m", "side": side, "workload": workload, **sizes}
    found = measured("generate", settings)
    assert found["settings"] == found["settings"] | settings
    figures = found["figures"]
    assert len(figures["all_tokens_per_second"]) == 3
    assert figures["tokens_per_second"] == pytest.approx(sum(figures["all_tokens_per_second"][1:]) / 2)
    assert 300_000 < figures["parameters"] < 500_000
    # Four completions of 8 tokens, or eight of 1 to 15; an end token ends some of them early.
    assert 0.5 * 32 < figures["tokens_per_round"] <= (32 if workload == "even" else 8 * 15)


def test_a_transfer_of_weights_is_measured_beside_a_plain_copy() -> None:
    figures = measured("sync", {"shape": "0.4m", "side": "torch", "rounds": 2, "threads": 1})["figures"]
    tiny = SHAPES["0.4m"]
    assert figures["bytes"] > 4 * 2 * tiny.vocab_size * tiny.hidden_size
    whole = figures["share_seconds"] + figures["load_seconds"]
    assert figures["bytes_per_second"] == pytest.approx(figures["bytes"] / whole)
    ratio = figures["ratio_to_copy"]
    assert ratio["n"] == 2
    assert ratio["least"] <= ratio["median"] <= ratio["most"]
    rounds = figures["all_seconds"]
    assert ratio["least"] <= (rounds["share"][1] + rounds["load"][1]) / rounds["copy"][1] <= ratio["most"]


def sampled(monkeypatch: pytest.MonkeyPatch, tokens: dict[str, float]) -> dict[str, Any]:
    """The comparison of invented engines: a seed makes each faster, and `tokens` is each one's work."""

    def measured(module: str, settings: dict[str, Any]) -> dict[str, Any]:
        rate = {"transformers": 100.0, "torch": 150.0, "vllm": 250.0}[settings["side"]]
        figures = {"tokens_per_second": rate, "tokens_per_round": tokens[settings["side"]]}
        if settings["side"] == "vllm":
            figures["tokens_per_second"] += 10 * settings["seed"]
        return {"settings": settings, "figures": {**figures, "start_seconds": 1.0, "parameters": 7}}

    monkeypatch.setattr(sampling, "measured", measured)
    return sampling.compare(["1m", "100m"], [1, 2, 5], {"batch": 4}, lambda line: None)


def test_engines_are_compared_by_shape_workload_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = sampled(monkeypatch, {"transformers": 100, "torch": 104, "vllm": 96})
    asked = [tuple(run["settings"][key] for key in ("workload", "seed", "shape", "side")) for run in result["runs"]]
    assert asked == list(itertools.product(sampling.WORKLOADS, [1, 2, 5], ["1m", "100m"], sampling.SIDES))
    assert all(run["settings"]["batch"] == 4 and run["circumstances"] for run in result["runs"])
    ratio = result["figures"]["1m, even"]["ratio_to_transformers"]["vllm"]
    assert ratio == {"median": 2.7, "least": 2.6, "most": 3.0, "n": 3}
    rows = list(sampling.table(result["figures"]))
    assert "| 100m, rollouts | vllm | 96 | 270 | 2.70 (2.60–3.00) | 1.0 |" in rows
    assert "| 100m, rollouts | transformers | 100 | 100 | 1 | 1.0 |" in rows
    with pytest.raises(UserError, match="--shape 7b: there is no such shape"):
        sampling.transfers(["7b"], {}, print)


def test_an_engine_that_made_other_work_gets_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    result = sampled(monkeypatch, {"transformers": 100, "torch": 100, "vllm": 94})
    assert list(result["figures"]["1m, even"]["ratio_to_transformers"]) == ["torch"]
    rows = list(sampling.table(result["figures"]))
    assert "| 1m, even | vllm | 94 | 270 | unequal | 1.0 |" in rows
    problem = "1m, even, vllm, seed 5: tokens a round: transformers 100, vllm 94: the work is unequal"
    assert any(row.startswith(problem) for row in rows)


@pytest.mark.nightly
def test_an_async_run_with_slow_episodes_reports_rate_ages_and_idle_time() -> None:
    settings = {"age": 1, "steps": 3, "prompts": 2, "generations": 2, "median_seconds": 0.05}
    found = measured("slow_episodes", settings)
    assert found["settings"] == found["settings"] | settings
    figures = found["figures"]
    assert figures["age_max"] == 1 > figures["age_mean"] > 0
    assert figures["tokens_per_second"] > 0
    assert 4 <= figures["completion_tokens_per_step"] <= 4 * 4
    assert figures["trained_tokens_per_step"] <= figures["completion_tokens_per_step"]
    assert figures["episode_seconds_per_step"] > 0
    assert all(0 <= figures[f"{who}_idle"] <= 1 for who in ("trainer", "engines"))


def trained(monkeypatch: pytest.MonkeyPatch, **of_age_2: float) -> dict[str, Any]:
    """The comparison of invented runs: age 2 has three or four times the tokens/s, and `of_age_2` besides."""

    def measured(module: str, settings: dict[str, Any]) -> dict[str, Any]:
        names = ("tokens_per_second", "step_seconds", "trainer_idle", "engines_idle", "age_mean", "age_max")
        names += ("first_reward", "last_reward")
        work = ("completion_tokens_per_step", "trained_tokens_per_step", "episode_seconds_per_step")
        figures = {**dict.fromkeys(names, 0.5), **dict.fromkeys(work, 200.0), "tokens_per_second": 100.0}
        if settings["age"]:
            figures |= {"tokens_per_second": 100.0 * settings["seed"], **of_age_2}
        return {"settings": settings, "figures": figures}

    monkeypatch.setattr(asynchronous, "measured", measured)
    return asynchronous.compare([2], [3, 4], {"steps": 4}, lambda line: None)


def test_asynchronous_runs_are_compared_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = trained(monkeypatch, completion_tokens_per_step=209.0)
    runs = [(run["settings"]["seed"], run["settings"]["age"]) for run in result["runs"]]
    assert runs == [(3, 0), (3, 2), (4, 0), (4, 2)]
    assert all(run["circumstances"] for run in result["runs"])
    figures = result["figures"]["age 2"]
    assert figures["tokens_per_second"] == 350
    assert figures["ratio_to_synchronous"] == {"median": 3.5, "least": 3, "most": 4, "n": 2}
    assert figures["last_reward_by_seed"] == [0.5, 0.5]
    rows = list(asynchronous.table(result["figures"]))
    assert "| age 2 | 350 | 3.50 (3.00–4.00) | 0.50 | 50% | 50% | 0.50 | 0.50 to 0.50 |" in rows


def test_an_age_that_made_other_work_gets_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    result = trained(monkeypatch, trained_tokens_per_step=150.0)
    assert "ratio_to_synchronous" not in result["figures"]["age 2"]
    rows = list(asynchronous.table(result["figures"]))
    assert "| age 2 | 350 | unequal | 0.50 | 50% | 50% | 0.50 | 0.50 to 0.50 |" in rows
    assert any(row.startswith("age 2, seed 4: trained tokens a step: age 0 200, age 2 150: ") for row in rows)


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


@pytest.mark.nightly
def test_both_sides_train_on_exactly_the_forced_lengths(tmp_path: Path) -> None:
    settings = side_by_side.Settings(("tiny",), (1,), 3, 2, 8, 16, 16, 6.0, threads=1)
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
    asked = [sum(forced.lengths(1, step, 16, 6.0, 16)) for step in (1, 2, 3)]
    assert min(asked) > 16 * 3
    for run in result["runs"]:
        assert [step["completion_tokens"] for step in run["steps"]] == asked
        assert [step["trained_tokens"] for step in run["steps"]] == asked
        assert run["circumstances"]
    assert ("ratio" in result["figures"]["tiny"]) == bool(trl)
    header, _, *rows = side_by_side.table(result["figures"])
    rows = [row for row in rows if row.startswith("|")]
    assert all(row.count("|") == header.count("|") for row in rows)
    assert len(rows) == len(sides) + bool(trl)


def a_run(side: str, seed: int, *seconds: float, tokens: float = 100.0, trained: float = 90.0) -> dict[str, Any]:
    steps = [
        {
            "step": each,
            "generation": each / 2,
            "update": each / 4,
            "completion_tokens": tokens,
            "trained_tokens": trained,
        }
        for each in seconds
    ]
    memory = {"peak_memory_mib": 400.0, "largest_process_mib": 200.0 if side == "trl" else 100.0}
    return {"model": "tiny", "seed": seed, "side": side, "steps": steps, **memory}


def test_a_comparison_leaves_out_the_first_step_and_divides_seed_by_seed() -> None:
    ours = [a_run("slurmkit", 1, 99, 1, 1), a_run("slurmkit", 2, 99, 2, 4), a_run("slurmkit", 3, 99, 2, 2)]
    theirs = [a_run("trl", 2, 50, 6, 6, tokens=104), a_run("trl", 1, 50, 3, 5), a_run("trl", 3, 50, 5, 5)]
    figures = side_by_side.summary([*ours, *theirs])["tiny"]
    assert figures["slurmkit"]["tokens_per_second"] == 50
    assert figures["slurmkit"]["step"] == 2
    assert figures["slurmkit"]["logprobs"] == 0
    assert figures["trl"]["tokens_per_second"] == 20
    assert figures["ratio"]["step"] == {"median": 0.4, "least": 0.25, "most": 0.5, "n": 3}
    assert figures["ratio"]["tokens_per_second"] == pytest.approx(
        {"median": 2.5, "least": 200 / 104, "most": 4, "n": 3}
    )
    assert figures["ratio"]["peak_memory_mib"]["median"] == 1
    assert figures["ratio"]["largest_process_mib"]["median"] == 0.5
    rows = list(side_by_side.table({"tiny": figures}))
    assert any(row.startswith("| tiny | ratio |") and "2.50 (1.92–4.00)" in row for row in rows)


@pytest.mark.parametrize("other", [{"tokens": 106.0}, {"trained": 80.0}])
def test_sides_that_made_other_work_get_no_ratio(other: dict[str, float]) -> None:
    runs = [
        a_run("slurmkit", 1, 9, 1),
        a_run("trl", 1, 9, 3),
        a_run("slurmkit", 2, 9, 1),
        a_run("trl", 2, 9, 3, **other),
    ]
    figures = side_by_side.summary(runs)["tiny"]
    assert "ratio" not in figures
    (problem,) = figures["unequal"]
    name = "completion tokens a step: slurmkit 100, trl 106" if "tokens" in other else "slurmkit 90, trl 80"
    assert problem.startswith("seed 2: ")
    assert name in problem
    rows = list(side_by_side.table({"tiny": figures}))
    assert any(row.startswith("| tiny | unequal |") for row in rows)
    assert rows[-1] == f"tiny, {problem}: the work is unequal, so there is no ratio."


def test_work_is_equal_within_five_percent_and_never_if_there_is_none() -> None:
    def difference(one: float, other: float) -> str:
        return equal_work.difference({"a": {"tokens": one}, "b": {"tokens": other}})

    assert difference(100, 105) == difference(105, 100) == ""
    assert difference(2915, 6283) == "tokens: a 2,915, b 6,283"
    assert difference(100, 105.1)
    assert difference(0, 0) == "tokens: a 0, b 0"


def test_forced_lengths_follow_from_the_seed_and_the_step() -> None:
    lengths = forced.lengths(1, 1, 1000, 30.0, 128)
    assert lengths == forced.lengths(1, 1, 1000, 30.0, 128)
    assert lengths[:128] == forced.lengths(1, 1, 128, 30.0, 128)
    assert lengths != forced.lengths(1, 2, 1000, 30.0, 128) != forced.lengths(2, 1, 1000, 30.0, 128)
    assert (min(lengths), max(lengths)) == (1, 128)
    assert 27 < sum(lengths) / 1000 < 31


def test_a_tree_s_memory_holds_that_of_grandchildren() -> None:
    grandchild = "import time; held = bytearray(200 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(2)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen([sys.executable, "-c", code]) as child, WatchedTree(child.pid) as watched:
        child.wait(60)
    assert 200 < watched.largest_process_mib < 300
    assert watched.peak_mib > 200


def test_compare_flags_over_1_percent_more_memory_or_15_less_throughput() -> None:
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
            "--shape qwen3: there is no such shape; there are tiny, 0.4m, 1m, 20m, small",
        ),
        (["--fake-data", "--seq-length", "10", "--sequences", "3"], "--seq-length 10 cannot be 3 equal sequences"),
        (["--fake-data", "--vocab-sizes", "512"], "--vocab-sizes 512: give two or more"),
        (["--fake-data", "--models", "0.4M"], "--models is for a measurement beside TRL: give it without --fake-data"),
        (["--shape", "tiny"], "--shape is for a measurement on fake data: give it with --fake-data"),
        (["--models", "1T"], "--models 1T: there is no such model; there are tiny, 0.4M, 20M"),
        (["--micro-batch", "48"], "--micro-batch 48 must divide the 64 completions of a step"),
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


def test_workplace_bench_counts_episodes_and_gold_calls_earn_full_reward() -> None:
    found = measured("workplace", {"episodes": 60, "tasks": 28})
    figures = found["figures"]
    assert (figures["episodes"], len(figures["memory_mib"])) == (60, 11)
    assert figures["reward_mean"] == 1.0
    assert 3 <= figures["calls_per_episode"] <= 6
    assert 0 < figures["slowest_episodes_per_second"] <= figures["episodes_per_second"]
    assert figures["memory_growth_mib"] == figures["memory_mib"][-1] - figures["memory_mib"][0]
