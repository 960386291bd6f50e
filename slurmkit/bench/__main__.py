"""`python -m slurmkit.bench OPTIONS`, as JSON: what `slurmkit bench` starts. Exit codes are slurmkit's."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slurmkit.bench import asynchronous, baseline, growth, sampling, side_by_side
from slurmkit.bench.child import measured
from slurmkit.bench.machine import circumstances, machine, versions
from slurmkit.bench.shapes import shape_of
from slurmkit.errors import SlurmkitError

_DRIVER_TARGET_MS = 50.0
_TURN_TARGET_MS = 5.0


def main(options: dict[str, Any]) -> None:
    """Measure what `options["benchmark"]` names; print it, keep it and compare it as asked."""
    compared, kept = options.pop("compare", None), options.pop("save_baseline", None)
    old = baseline.read(Path(compared)) if compared else None  # first, as a measurement may take an hour
    name, as_json = options.pop("benchmark"), options.pop("json")
    circumstance = circumstances()
    figures, lines = _BENCHMARKS[name](options)
    text = "\n".join(lines)
    result = {"benchmark": name, **figures, "machine": machine(), "circumstances": circumstance, "versions": versions()}
    print(json.dumps(result, indent=2) if as_json else text, flush=True)
    if old is not None:
        for line in baseline.compare(result, old):
            _say(line)
    if kept is not None:
        baseline.save(Path(kept), result)


def _fake_data(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    given = dict(options)
    sizes = given.pop("vocab_sizes", None)
    if "shape" in given:
        shape_of(given["shape"])
    if sizes is not None:
        result = growth.measure(sizes, given, _say)
        return result, growth.table(result["figures"])
    result = measured("fake_data", given)
    return result, _fake_data_lines(result["settings"], result["figures"])


def _fake_data_lines(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{settings['shape']}, {settings['micro_batches']} micro-batches of {settings['seq_length']} tokens, "
        f"{settings['precision']} on {figures['device_name']}"
    )
    yield f"tokens/s      {figures['tokens_per_second']:,.0f}"
    yield f"step          {figures['step_seconds']:.3f} s, {figures['micro_batch_seconds']:.3f} s a micro-batch"
    peak, source = figures["peak_flops"] / 1e12, figures["peak_flops_from"]
    yield f"MFU           {figures['mfu']:.1%} of {peak:,.2f} TFLOP/s ({source})"
    loaded = figures["loaded_memory_mib"]
    yield f"peak memory   {figures['peak_memory_mib']:,.0f} MiB, {loaded:,.0f} MiB before the first step"


def _beside_trl(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    given = dict(options)
    cache, python, alone = Path(given.pop("cache")), given.pop("trl_python", None), given.pop("alone")
    settings = side_by_side.Settings(**given)
    side_by_side.check(settings)
    trl = None if alone else side_by_side.trl_python(Path(python) if python else None, cache, _say)
    with tempfile.TemporaryDirectory(prefix="slurmkit-bench-", dir="/var/tmp") as folder:
        result = side_by_side.measure(settings, trl, cache, Path(folder), _say)
    return {"settings": asdict(settings), **result}, side_by_side.table(result["figures"])


def _driver(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    result = measured("driver", options)
    return result, _driver_lines(result["settings"], result["figures"])


def _driver_lines(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[str]:
    rollouts = settings["prompts"] * settings["generations"]
    yield f"{settings['ranks']} ranks, {rollouts} rollouts of {settings['tokens']} tokens in the mean"
    yield "| part | ms a step |"
    yield "|---|---:|"
    for part in ("rollout", "samples", "credit", "packing", "update", "weights", "gauge", "log", "other", "step"):
        yield f"| {part} | {figures[f'{part}_ms']:.1f} |"
    yield f"| step, processor time | {figures['step_cpu_ms']:.1f} |"
    yield f"| the worst step's | {figures['worst_step_cpu_ms']:.1f} |"
    yield f"| step but rollout, target {_DRIVER_TARGET_MS:g} | {figures['between_rollouts_ms']:.1f} |"


def _rollout(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    result = measured("rollout", options)
    return result, _rollout_lines(result["settings"], result["figures"])


def _rollout_lines(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[str]:
    episodes, prompt, whole = settings["groups"] * settings["generations"], "prompt_tokens", "sequence_tokens"
    yield f"{episodes} episodes at once, {settings['turns']} turns each, {settings['tools']} tools"
    yield f"{figures[prompt]} tokens of prompt, {figures[whole]} at the end"
    yield "| the driver's part | ms |"
    yield "|---|---:|"
    yield f"| a turn, target {_TURN_TARGET_MS:g} | {figures['turn_ms']:.2f} |"
    yield f"| a turn, processor time | {figures['turn_cpu_ms']:.2f} |"
    yield f"| an opening, once a group, processor time | {figures['opening_ms']:.2f} |"
    yield f"| the samples of an episode, processor time | {figures['samples_ms']:.2f} |"


def _generate(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    given = dict(options)
    result = sampling.compare(given.pop("shapes"), given.pop("seeds"), given, _say)
    return result, sampling.table(result["figures"])


def _sync(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    given = dict(options)
    result = sampling.transfers(given.pop("shapes"), given, _say)
    return result, sampling.transfer_table(result["figures"])


def _asynchronous(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    given = dict(options)
    result = asynchronous.compare(given.pop("ages"), given.pop("seeds"), given, _say)
    return result, asynchronous.table(result["figures"])


def _workplace(options: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    result = measured("workplace", options)
    return result, _workplace_lines(result["figures"])


def _workplace_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    rate, memory = figures["episodes_per_second"], figures["memory_mib"]
    yield f"episodes/s   {rate:,.0f} of {figures['calls_per_episode']:.1f} calls, in one process"
    yield f"memory       {memory[0]:.1f} MiB, {memory[-1]:.1f} MiB after {figures['episodes']:,} episodes"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_BENCHMARKS = {
    "fake-data": _fake_data,
    "beside-trl": _beside_trl,
    "driver": _driver,
    "rollout": _rollout,
    "generate": _generate,
    "sync": _sync,
    "async": _asynchronous,
    "workplace": _workplace,
}


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except SlurmkitError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
