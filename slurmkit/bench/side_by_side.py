"""slurmkit beside TRL's GRPOTrainer: the same model, tasks, judge and settings, in turns on the same cores.

What is alike: the folder of the model, the order of the tasks (not shuffled), completions per step, the limit on their
length, temperature 1 without top-p or top-k, float32, AdamW and its settings, the norm gradients are clipped to, the
ratio clip, one update per step, token-level loss (DAPO's), advantages by the group's standard deviation, no KL, no
reference model, as many sequences in a micro-batch (slurmkit, which packs them, is given the tokens that so many have
in the mean), cores and threads. Activation checkpointing is off on both sides; nothing is logged elsewhere, saved or
validated.

What is not: slurmkit is its whole path (`slurmkit run`: the driver, Ray, FSDP2 on one rank, an engine in a process of
its own), TRL one process. slurmkit packs what TRL pads, leaves out samples whose advantage is 0, and measures ratios
against the engine's own logprobs; TRL against the policy's, which on policy are 1. Sampled tokens differ, so do
lengths: compare tokens/s before seconds. Both leave the first step out of every figure of time.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import slurmkit
from slurmkit.bench.child import DEADLINE_SECONDS, measured
from slurmkit.bench.machine import WatchedTree
from slurmkit.errors import Failure, UserError

TRL = ("trl==1.16.0", "torch==2.13.0")
PHASES = ("generation", "logprobs", "update", "weights", "step")
_SIDES = ("slurmkit", "trl")
# Of a question in tasks.jsonl, by the chat template.
_PROMPT_TOKENS = 16
_OPTIMIZER = {"weight_decay": 0.0, "betas": [0.9, 0.95], "eps": 1e-8}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64},
    "0.4M": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 288},
    "20M": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1536},
}
_SUPERVISED = {
    "tiny": {"num_hidden_layers": 1, "supervised_steps": 30, "supervised_batch_size": 8, "supervised_lr": 1e-2},
    "0.4M": {"num_hidden_layers": 2, "supervised_steps": 400, "supervised_batch_size": 32, "supervised_lr": 3e-3},
    "20M": {"num_hidden_layers": 6, "supervised_steps": 60, "supervised_batch_size": 16, "supervised_lr": 1e-3},
}
# So small that lengths stay what they are: a batch of long completions has more tokens per second than one of short.
_LEARNING_RATES = {"tiny": 1e-3, "0.4M": 2e-4, "20M": 2e-5}


@dataclass(frozen=True, slots=True)
class Settings:
    """What is compared. `micro_batch` counts sequences, `mean_dots` is about the mean completion."""

    models: Sequence[str] = ("0.4M", "20M")
    seeds: Sequence[int] = (1, 2, 3)
    steps: int = 30
    prompts: int = 16
    generations: int = 8
    micro_batch: int = 32
    max_new_tokens: int = 128
    mean_dots: float = 30.0
    threads: int = len(os.sched_getaffinity(0))


def check(settings: Settings) -> None:
    """UserError where the settings cannot work, before anything is made."""
    for name in settings.models:
        if name not in _SIZES:
            raise UserError(f"--models {name}: there is no such model; there are {', '.join(_SIZES)}")
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
                if subprocess.run(command, stdout=sys.stderr).returncode:
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
    """All runs, each side first in turn, and their summary. Without `trl`, slurmkit alone.

    Models are kept in `cache`, runs in `folder`.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    runs = []
    for name in settings.models:
        start = _starting_model(name, settings, cache, say)
        for index, seed in enumerate(settings.seeds):
            for side in _SIDES if index % 2 == 0 else reversed(_SIDES):
                if side == "trl" and trl is None:
                    continue
                say(f"{name}, seed {seed}: {side}")
                here = folder / f"{name}-{seed}-{side}"
                here.mkdir(parents=True)
                run = _slurmkit(name, settings, start, seed, here) if trl is None or side == "slurmkit" else None
                run = run or _trl(name, settings, start, seed, here, trl or Path())
                runs.append({"model": name, "seed": seed, "side": side, **run})
    return {"figures": summary(runs), "runs": runs}


def _starting_model(name: str, settings: Settings, cache: Path, say: Callable[[str], None]) -> Path:
    made = {
        "sizes": _SIZES[name] | _SUPERVISED[name],
        "mean_dots": settings.mean_dots,
        "max_length": _PROMPT_TOKENS + settings.max_new_tokens,
        "seed": 0,
    }
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / "models" / f"{name}-{digest}"
    if not (folder / "model").exists():
        say(f"making a model of {name} parameters in {folder}")
        measured("starting_model", {**made, "folder": str(folder)})
    return folder


def _slurmkit(name: str, settings: Settings, start: Path, seed: int, here: Path) -> dict[str, Any]:
    completions = settings.prompts * settings.generations
    tasks = {"data_path": str(start / "tasks.jsonl")}
    config = {
        "env": {"name": "math"},
        "data": {"train": tasks, "validation": tasks, "shuffle": False},
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
            "model_name": str(start / "model"),
            "train_global_batch_size": completions,
            "sequence_packing": {"train_mb_tokens": _micro_batch_tokens(settings)},
            "max_total_sequence_length": _PROMPT_TOKENS + settings.max_new_tokens,
            "precision": "float32",
            "optimizer": {"kwargs": {"lr": _LEARNING_RATES[name], **_OPTIMIZER}},
            "generation": {"max_new_tokens": settings.max_new_tokens, "max_batch_size": completions},
        },
        "checkpointing": {"enabled": False},
        "cluster": {"gpus_per_node": 0},
    }
    (here / "config.yaml").write_text(json.dumps(config))  # which YAML takes
    command = [sys.executable, "-c", "from slurmkit.cli.main import main; main()", "run"]
    command += ["--config=config.yaml", "--name=run", "--results-dir=results"]
    memory = _run(command, here, settings, {})
    lines = [json.loads(line) for line in (here / "results/run/metrics.jsonl").read_text().splitlines()]
    phases = {"generation": "time:rollout", "update": "time:update", "weights": "time:weights", "step": "time:step"}
    steps = [
        {
            "logprobs": line.get("time:logprobs", 0.0),
            **{phase: line.get(key, 0.0) for phase, key in phases.items()},
            "reward_mean": line["train:reward_mean"],
            "completion_tokens": line["train:completion_tokens_mean"] * completions,
        }
        for line in lines
    ]
    return {"steps": steps, **memory}


def _micro_batch_tokens(settings: Settings) -> int:
    # A completion is its dots, the answer and the end token.
    mean = round(settings.micro_batch * (_PROMPT_TOKENS + settings.mean_dots + 2))
    return max(mean, _PROMPT_TOKENS + settings.max_new_tokens)


def _trl(name: str, settings: Settings, start: Path, seed: int, here: Path, python: Path) -> dict[str, Any]:
    told = asdict(settings) | {
        "model": str(start / "model"),
        "tasks": str(start / "tasks.jsonl"),
        "folder": str(here / "output"),
        "seed": seed,
        "lr": _LEARNING_RATES[name],
        "clip": 0.2,
        "max_grad_norm": 1.0,
        **_OPTIMIZER,
    }
    (here / "settings.json").write_text(json.dumps(told))
    # Of our environment only the package itself: the judge of answers, which needs nothing else.
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
        child = subprocess.Popen(command, cwd=here, env=inherited, stdout=output, stderr=subprocess.STDOUT)
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
    """For each model, each side's figures over its runs and, where both ran, slurmkit's divided by TRL's."""
    figures: dict[str, Any] = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        sides = {side: [run for run in runs if (run["model"], run["side"]) == (name, side)] for side in _SIDES}
        figures[name] = {side: _figures(found) for side, found in sides.items() if found}
        if len(figures[name]) == len(_SIDES):
            ours, theirs = (figures[name][side] for side in _SIDES)
            figures[name]["ratio"] = {
                key: ours[key] / theirs[key]
                for key in ("tokens_per_second", "step", "peak_memory_mib", "largest_process_mib")
            }
    return figures


def _figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the steps of all runs but each one's first; memory is the largest, rewards are of the last steps."""
    timed = [step for run in runs for step in run["steps"][1:]]
    rewards = [statistics.fmean(step["reward_mean"] for step in run["steps"][-_last(run) :]) for run in runs]
    return {
        **{phase: statistics.fmean(step.get(phase, 0.0) for step in timed) for phase in PHASES},
        "tokens_per_second": sum(step["completion_tokens"] for step in timed) / sum(step["step"] for step in timed),
        "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
        "largest_process_mib": max(run["largest_process_mib"] for run in runs),
        "first_reward": statistics.fmean(run["steps"][0]["reward_mean"] for run in runs),
        "last_reward": statistics.fmean(rewards),
        "last_reward_by_seed": rewards,
    }


def _last(run: dict[str, Any]) -> int:
    return max(1, len(run["steps"]) // 5)


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The summary in Markdown."""
    columns = [*(f"{phase} s" for phase in PHASES), "tokens/s", "peak MiB", "largest process MiB", "reward"]
    yield f"| model | | {' | '.join(columns)} |"
    yield "|---|---|" + "---:|" * len(columns)
    for name, sides in figures.items():
        for side in _SIDES:
            if side not in sides:
                continue
            found = sides[side]
            cells = [f"{found[phase]:.3f}" for phase in PHASES]
            cells += [f"{found[key]:,.0f}" for key in ("tokens_per_second", "peak_memory_mib", "largest_process_mib")]
            cells.append(f"{found['first_reward']:.2f} → {found['last_reward']:.2f}")
            yield f"| {name} | {side} | {' | '.join(cells)} |"
        if ratio := sides.get("ratio"):
            keys = ("step", "tokens_per_second", "peak_memory_mib", "largest_process_mib")
            yield f"| {name} | ratio | | | | | {' | '.join(f'{ratio[key]:.2f}' for key in keys)} | |"
