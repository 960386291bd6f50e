"""Runs made by hand, with figures and conversations, and the facts that their page begins with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slurmkit.report.page import AttemptFacts, RunFacts

# What would run, end its place, or confuse a reader if it were anything but text.
HOSTILE = [
    "</script><script>document.title='ran'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "{{ 7 * 7 }}",
    "{% include 'page.css' %}",
    "\"'><svg onload=document.title='ran'>",
    "]]>\u2028\u2029\x00\x1b[2J",
    "\u202egnirts\u202c",
    "\ud83d",
    "javascript:document.title='ran'",
    "</script x",
    "<!-- <script x",
]


def write_steps(run: Path, last_step: int, *, learns: float = 1.0) -> Path:
    """Step 0 and `last_step` more, a validation every tenth; the reward of step n is learns · n / (n + 10)."""
    run.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"step": 0, "val:accuracy": 0.1, "val:reward_mean": 0.1}]
    for step in range(1, last_step + 1):
        reward = learns * step / (step + 10)
        row = {
            "step": step,
            **{"train:reward_mean": reward, "train:reward_std": 0.25, "train:accuracy": reward, "train:loss": -0.01},
            **{"train:approx_kl": 0.001, "train:entropy": math.exp(-step / 50), "train:grad_norm": 0.5},
            **{"train:completion_tokens_mean": 12 + step % 3, "perf:tokens_per_sec_per_gpu": 1500 + step},
            **{"time:step": 4.0, "time:rollout": 2.0, "time:update": 1.5, "time:other": 0.5},
        }
        if step % 10 == 0:
            row |= {"val:accuracy": reward, "val:reward_mean": reward, "time:validation": 0.25}
        rows.append(row)
    lines = [json.dumps({"last_step": last_step, **row}) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def episode(*tokens: str, task: str = "sum", reward: float = 1.0, given: int = 2, advantage: float = 0.75) -> Any:
    """An episode of one sample, of whose tokens the first `given` were not sampled."""
    mask = [int(place >= given) for place in range(len(tokens))]
    sample = {
        "finish_reason": "stop",
        "weight_version": 3,
        "temperature": 1.0,
        "tokens": list(tokens),
        "mask": mask,
        "logprobs": [-0.5 if counts else None for counts in mask],
        "advantages": [advantage * counts for counts in mask],
    }
    return {"task": task, "group": 0, "reward": reward, "correct": reward > 0, "samples": [sample]}


def write_samples(run: Path, step: int, *episodes: Any) -> Path:
    path = run / "samples" / f"step_{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in episodes))
    return path


def facts_of(run: Path, **others: Any) -> RunFacts:
    folder = run / "attempts" / "4711.0"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("driver.log", "node-node 1.log"):
        (folder / name).write_text("")
    attempt = AttemptFacts(
        **{"name": "4711.0", "job_id": "4711", "nodes": "node[1-2]", "started": "2026-11-29 15:30:00", "took": "5:12"},
        **{"end": "node node2: its raylet died (exit code 75)", "is_good": False, "bad_nodes": ["node2"]},
        folder=folder,
    )
    given = {"name": run.name, "path": run, "state": "failed", "reason": "", "facts": {}, "attempts": [attempt]}
    return RunFacts(**{**given, **others})
