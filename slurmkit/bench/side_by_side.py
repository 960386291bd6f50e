"""slurmkit and TRL's GRPOTrainer on equal work, in turns on the same cores.

Both sides have the same folder of a model (random weights), questions in the same order, reward function, completions
per step, lengths of all completions, temperature 1 without top-p or top-k, float32, AdamW and its settings, gradient
clipping, ratio clipping, one update per step, token-level loss (DAPO's), advantages by the group's standard deviation,
no KL, no reference model, cores and threads. A micro-batch holds as many sequences (slurmkit packs sequences, so it
gets the mean number of tokens of so many). Activation checkpointing, logging elsewhere, saving and validation are off.

Lengths are forced: each side draws exactly the number of tokens that `forced.lengths` gives. The reward differs within
every group, so both sides train on every completion (slurmkit skips a completion whose advantage is 0). Each side
reports the completion tokens that it made and the tokens that it trained on; `equal_work` compares them.

The sides differ in this: slurmkit is a driver, Ray, FSDP2 on one rank and an engine in a process of its own; TRL is
one process. slurmkit packs sequences, TRL pads them. Ratios are 1 on both sides, as every step is on policy. Both leave
the first step out of every figure of time.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import slurmkit
from slurmkit.bench import equal_work
from slurmkit.bench.child import DEADLINE_SECONDS, measured
from slurmkit.bench.forced import PROMPT_TOKENS
from slurmkit.bench.machine import WatchedTree, circumstances
from slurmkit.errors import Failure, UserError
from slurmkit.processes import end_with_parent

TRL = ("trl==1.16.0", "torch==2.13.0")
PHASES = ("generation", "logprobs", "update", "weights", "step")
# Amounts of work of a step, which must be equal, and their names in tables.
_WORK = {"completion_tokens": "completion tokens a step", "trained_tokens": "trained tokens a step"}
_RATIOS = ("step", "tokens_per_second", "peak_memory_mib", "largest_process_mib")
_SIDES = ("slurmkit", "trl")
_OPTIMIZER = {"weight_decay": 0.0, "betas": [0.9, 0.95], "eps": 1e-8}
_LEARNING_RATE = 1e-5
# Names of --models, and the shapes of shapes.py.
_SHAPES = {"tiny": "tiny", "0.4M": "0.4m", "20M": "20m"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a comparison. `micro_batch` counts sequences, `new_tokens` is about the mean completion."""

    models: Sequence[str] = ("0.4M", "20M")
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    steps: int = 4
    prompts: int = 8
    generations: int = 8
    micro_batch: int = 32
    max_new_tokens: int = 128
    new_tokens: float = 30.0
    threads: int = len(os.sched_getaffinity(0))


def check(settings: Settings) -> None:
    """UserError where the settings cannot work, before anything is made."""
    for name in settings.models:
        if name not in _SHAPES:
            raise UserError(f"--models {name}: there is no such model; there are {', '.join(_SHAPES)}")
    completions = settings.prompts * settings.generations
    if completions % settings.micro_batch or settings.micro_batch % settings.generations:
        raise UserError(
            f"--micro-batch {settings.micro_batch} must divide the {completions} completions of a step and hold whole "
            f"groups of {settings.generations} (TRL's rule)"
        )
    if settings.steps < 2:
        raise UserError(f"--steps {settings.steps}: the first step is left out, so there must be at least 2")


def trl_python(given: Path | None, cache: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment that has TRL: the one that was given, or one made in `cache`.

    UserError where the given one cannot import it, Failure where the environment cannot be made.
    """
    python = given
    if python is None:
        folder = cache / TRL[0]
        python, done = folder / "bin" / "python", folder / "installed"
        if not done.exists():
            say(f"installing {' '.join(TRL)} into {folder}")
            made = [sys.executable, "-m", "venv", str(folder)]
            for command in (made, [str(python), "-m", "pip", "install", "-qq", *TRL]):
                if subprocess.run(command, stdout=sys.stderr, preexec_fn=end_with_parent).returncode:
                    raise Failure(f"{folder}: an environment for {TRL[0]} cannot be made; give one with --trl-python")
            done.touch()
    try:
        tried = subprocess.run([python, "-c", "import trl"], capture_output=True, text=True, timeout=300)
    except OSError as error:
        raise UserError(f"--trl-python {python}: {error.strerror}") from None
    if tried.returncode:
        reason = tried.stderr.strip().splitlines()[-1:] or [f"exit code {tried.returncode}"]
        raise UserError(f"--trl-python {python}: it cannot import trl: {reason[0]}")
    return python


def measure(
    settings: Settings, trl: Path | None, cache: Path, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run all sides, each one first in turn, and return the runs and their summary. Without `trl`, slurmkit alone.

    Models are kept in `cache`, runs in `folder`.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    runs = []
    for name in settings.models:
        model = _random_model(name, settings, cache, say)
        for index, seed in enumerate(settings.seeds):
            for side in _SIDES if index % 2 == 0 else reversed(_SIDES):
                if side == "trl" and trl is None:
                    continue
                say(f"{name}, seed {seed}: {side}")
                here = folder / f"{name}-{seed}-{side}"
                here.mkdir(parents=True)
                run = {"model": name, "seed": seed, "side": side, "circumstances": circumstances()}
                if side == "trl":
                    runs.append(run | _trl(settings, model, seed, here, trl))
                else:
                    runs.append(run | _slurmkit(settings, model, seed, here))
    return {"figures": summary(runs), "runs": runs}


def _random_model(name: str, settings: Settings, cache: Path, say: Callable[[str], None]) -> Path:
    max_length = PROMPT_TOKENS + settings.max_new_tokens
    folder = cache / "models" / f"random-{_SHAPES[name]}-{max_length}"
    if not folder.exists():
        say(f"making a model of random weights in {folder}")
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        measured("random_model", {"folder": str(unfinished), "shape": _SHAPES[name], "max_length": max_length})
        os.replace(unfinished, folder)
    return folder


def _slurmkit(settings: Settings, model: Path, seed: int, here: Path) -> dict[str, Any]:
    completions = settings.prompts * settings.generations
    config = {
        "env": {"name": "arithmetic"},  # slurmkit_side.py replaces it
        "data": {"shuffle": False},
        "grpo": {
            "num_prompts_per_step": settings.prompts,
            "num_generations_per_prompt": settings.generations,
            "max_num_steps": settings.steps,
            "max_num_epochs": settings.steps * settings.prompts,
            "max_steps_without_signal": None,
            "use_leave_one_out_baseline": False,
            "val_period": 0,
            "seed": seed,
        },
        "policy": {
            "model_name": str(model),
            "train_global_batch_size": completions,
            "sequence_packing": {"train_mb_tokens": _micro_batch_tokens(settings)},
            "max_total_sequence_length": PROMPT_TOKENS + settings.max_new_tokens,
            "precision": "float32",
            "optimizer": {"kwargs": {"lr": _LEARNING_RATE, **_OPTIMIZER}},
            "generation": {
                "max_new_tokens": settings.max_new_tokens,
                "min_new_tokens": settings.max_new_tokens,
                "max_batch_size": completions,
            },
        },
        # Forced lengths are min_new_tokens, which the configuration accepts with this key only.
        "loss_fn": {"force_on_policy_ratio": True},
        "checkpointing": {"enabled": False, "checkpoint_dir": str(here / "run"), "metric_name": None},
        "cluster": {"gpus_per_node": 0},
    }
    told = {"config": config, "seed": seed}
    told |= {"new_tokens": settings.new_tokens, "max_new_tokens": settings.max_new_tokens}
    (here / "settings.json").write_text(json.dumps(told))
    # Ray reads these when it is imported, see grpo/private_ray.py.
    protection = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    memory = _run([sys.executable, "-m", "slurmkit.bench.slurmkit_side", "settings.json"], here, settings, protection)
    lines = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    phases = {"generation": "time:rollout", "update": "time:update", "weights": "time:weights", "step": "time:step"}
    steps = [
        {
            "logprobs": line.get("time:logprobs", 0.0),
            **{phase: line.get(key, 0.0) for phase, key in phases.items()},
            "completion_tokens": line["train:completion_tokens_mean"] * completions,
            "trained_tokens": line.get("train:trained_tokens", 0.0),
        }
        for line in lines
    ]
    return {"steps": steps, **memory}


def _micro_batch_tokens(settings: Settings) -> int:
    mean = round(settings.micro_batch * (PROMPT_TOKENS + settings.new_tokens))
    return max(mean, PROMPT_TOKENS + settings.max_new_tokens)


def _trl(settings: Settings, model: Path, seed: int, here: Path, python: Path | None) -> dict[str, Any]:
    told = asdict(settings) | {
        "model": str(model),
        "folder": str(here / "output"),
        "seed": seed,
        "lr": _LEARNING_RATE,
        "clip": 0.2,
        "max_grad_norm": 1.0,
        **_OPTIMIZER,
    }
    (here / "settings.json").write_text(json.dumps(told))
    # TRL's process sees only this package of our environment. It imports forced.py, which needs nothing else.
    (here / "only").mkdir()
    package = Path(slurmkit.__file__).parent
    (here / "only" / "slurmkit").symlink_to(package)
    command = [str(python), str(package / "bench" / "trl_side.py"), "settings.json", "result.json"]
    memory = _run(command, here, settings, {"PYTHONPATH": str(here / "only")})
    return {**memory, **json.loads((here / "result.json").read_text())}


def _run(command: Sequence[str], here: Path, settings: Settings, environment: dict[str, str]) -> dict[str, float]:
    """Run one side to its end, and tell the memory that it took. Failure shows the end of what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    inherited |= {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1", **environment}
    log = here / "log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            cwd=here,
            env=inherited,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
        try:
            with WatchedTree(child.pid) as watched:
                code = child.wait(DEADLINE_SECONDS)
        except BaseException as error:
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failure(f"{command[0]} has not ended after {DEADLINE_SECONDS:g} s, see {log}") from None
            raise
    if code:
        shown = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise Failure(f"{command[0]} ended with exit code {code}, see {log}:\n{shown}")
    return {"peak_memory_mib": watched.peak_mib, "largest_process_mib": watched.largest_process_mib}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return each side's figures for each model and, if both sides ran, the ratio of slurmkit's figures to TRL's.

    Figures are medians over the runs. The ratio is taken seed by seed. If the work of a seed's two runs differs by more
    than 5 %, "unequal" says how, and there is no ratio.
    """
    figures: dict[str, Any] = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        sides = {side: [_figures(run) for run in _of(runs, name, side)] for side in _SIDES if _of(runs, name, side)}
        figures[name] = {
            side: {key: statistics.median(each[key] for each in found) for key in found[0]}
            for side, found in sides.items()
        }
        if len(sides) < len(_SIDES):
            continue
        unequal = [
            f"seed {run['seed']}: {problem}"
            for run, *pair in zip(_of(runs, name, _SIDES[0]), *sides.values(), strict=True)
            if (problem := equal_work.difference(dict(zip(sides, map(_work, pair), strict=True))))
        ]
        if unequal:
            figures[name]["unequal"] = unequal
            continue
        figures[name]["ratio"] = {
            key: equal_work.ratios(*([each[key] for each in found] for found in sides.values())) for key in _RATIOS
        }
    return figures


def _of(runs: Sequence[dict[str, Any]], name: str, side: str) -> list[dict[str, Any]]:
    found = [run for run in runs if (run["model"], run["side"]) == (name, side)]
    return sorted(found, key=lambda run: int(run["seed"]))


def _figures(run: dict[str, Any]) -> dict[str, float]:
    """Return the means over all steps of a run but the first, and its memory."""
    timed = run["steps"][1:]
    means = {key: statistics.fmean(step.get(key, 0.0) for step in timed) for key in (*PHASES, *_WORK)}
    return {
        **means,
        "tokens_per_second": means["completion_tokens"] / means["step"],
        "peak_memory_mib": run["peak_memory_mib"],
        "largest_process_mib": run["largest_process_mib"],
    }


def _work(figures: dict[str, float]) -> dict[str, float]:
    return {name: figures[key] for key, name in _WORK.items()}


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the summary in Markdown."""
    columns = [*(f"{phase} s" for phase in PHASES), *_WORK.values(), "tokens/s", "peak MiB", "largest process MiB"]
    whole = (*_WORK, "tokens_per_second", "peak_memory_mib", "largest_process_mib")
    yield f"| model | | {' | '.join(columns)} |"
    yield "|---|---|" + "---:|" * len(columns)
    for name, sides in figures.items():
        for side in _SIDES:
            if found := sides.get(side):
                cells = [*(f"{found[phase]:.3f}" for phase in PHASES), *(f"{found[key]:,.0f}" for key in whole)]
                yield f"| {name} | {side} | {' | '.join(cells)} |"
        if ratio := sides.get("ratio"):
            cells = [equal_work.shown(ratio[key]) if key in ratio else "" for key in (*PHASES, *whole)]
            yield f"| {name} | ratio | {' | '.join(cells)} |"
        if "unequal" in sides:
            yield f"| {name} | unequal | {' | '.join([''] * len(columns))} |"
    for name, sides in figures.items():
        if ratio := sides.get("ratio"):
            yield f"{name}: ratios are slurmkit's to TRL's, median (least–most) of {ratio['step']['n']} seeds."
        for problem in sides.get("unequal", ()):
            yield f"{name}, {problem}: the work is unequal, so there is no ratio."
