"""TRL's GRPOTrainer on the model, tasks and settings that slurmkit trains with: a side of `slurmkit bench train`.

Run as a file by the Python of TRL's own environment, where of slurmkit only the judge of answers is to be imported:

    PYTHON trl_side.py SETTINGS.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from slurmkit.envs.answers import final_number


class Clock:
    """Seconds of each phase of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._began = self._mark = time.perf_counter()
        self._now: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """To the step at hand."""
        self._now[name] = self._now.get(name, 0.0) + value

    def mark(self) -> None:
        """From here until `update_ends`, the gradient is clipped and the optimiser steps."""
        self._mark = time.perf_counter()

    def update_ends(self) -> None:
        """The optimiser has stepped."""
        self.add("update", time.perf_counter() - self._mark)

    def step_ends(self) -> None:
        """The next one begins at once: what TRL does between steps counts."""
        now = time.perf_counter()
        self.steps.append({"step": now - self._began, "logprobs": 0.0, "weights": 0.0, **self._now})
        self._began, self._now = now, {}


CLOCK = Clock()


class TimedTrainer(GRPOTrainer):  # type: ignore[misc] # TRL is not installed where this is checked
    """The same trainer, with a clock around its phases."""

    def _generate_and_score_completions(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = super()._generate_and_score_completions(*arguments, **options)
        CLOCK.add("generation", time.perf_counter() - began)
        return found

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = super()._get_per_token_logps_and_entropies(*arguments, **options)
        if not torch.is_grad_enabled():
            CLOCK.add("logprobs", time.perf_counter() - began)
        return found

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        # Rollouts are made just before it, so that forward and backward are what lies between here and `training_step`.
        CLOCK.mark()
        return super().compute_loss(*arguments, **options)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        found = super().training_step(*arguments, **options)
        CLOCK.update_ends()
        CLOCK.mark()
        return found


class Steps(TrainerCallback):  # type: ignore[misc]
    """Tells the clock."""

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        CLOCK.update_ends()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        CLOCK.step_ends()


def reward(completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """slurmkit's own judgement (env.name math), and what it was of."""
    scores = [
        float(final_number(completion[0]["content"]) == final_number(right))
        for completion, right in zip(completions, answer, strict=True)
    ]
    CLOCK.add("reward_mean", sum(scores) / len(scores))
    CLOCK.add("completion_tokens", float(sum(map(len, completion_ids))))
    return scores


def main(settings_path: str, result_path: str) -> None:
    settings = json.loads(Path(settings_path).read_text())
    torch.set_num_threads(settings["threads"])
    rows = [json.loads(line) for line in Path(settings["tasks"]).read_text().splitlines()]
    tasks = [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]
    completions = settings["prompts"] * settings["generations"]
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
        reward_funcs=[reward],
        train_dataset=Dataset.from_list(tasks),
        callbacks=[Steps()],
        args=GRPOConfig(
            output_dir=settings["folder"],
            use_cpu=True,
            bf16=False,
            seed=settings["seed"],
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["micro_batch"],
            gradient_accumulation_steps=completions // settings["micro_batch"],
            num_generations=settings["generations"],
            max_completion_length=settings["max_new_tokens"],
            temperature=1.0,
            beta=0.0,
            epsilon=settings["clip"],
            loss_type="dapo",
            scale_rewards="group",
            num_iterations=1,
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            weight_decay=settings["weight_decay"],
            adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1],
            adam_epsilon=settings["eps"],
            max_grad_norm=settings["max_grad_norm"],
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    CLOCK.step_ends()
    CLOCK.steps.clear()
    trainer.train()
    status = Path("/proc/self/status").read_text().split()
    result = {
        "steps": CLOCK.steps,
        "largest_process_mib": int(status[status.index("VmHWM:") + 1]) / 1024,
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
    }
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
