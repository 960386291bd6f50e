"""TRL's side of `slurmkit bench train`: its GRPOTrainer with the model, questions, lengths and settings of our side.

Run as a file by the Python of TRL's own environment, which can import only slurmkit.bench.forced of slurmkit:

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
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from slurmkit.bench import forced


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

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        CLOCK.add("trained_tokens", float(inputs["completion_mask"].sum()))
        # Rollouts are made just before it, so that forward and backward are what lies between here and `training_step`.
        CLOCK.mark()
        return super().compute_loss(model, inputs, *arguments, **options)

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


class _ExactLengths(LogitsProcessor):  # type: ignore[misc]
    """Forbids the end token before the last token of each completion, and forces it there."""

    def __init__(self, lengths: list[int], prompt_tokens: int, end_id: int) -> None:
        self._last_B = torch.tensor(lengths) - 1
        self._prompt_tokens, self._end_id = prompt_tokens, end_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        number = input_ids.shape[1] - self._prompt_tokens
        is_last_B = self._last_B == number
        scores[:, self._end_id] = -torch.inf
        scores[is_last_B] = -torch.inf
        scores[is_last_B, self._end_id] = 0.0
        return scores


def force_lengths(model: Any, settings: dict[str, Any], end_id: int) -> None:
    """Make each call of `model.generate`, which is one step's, sample the step's lengths."""
    generate, step = model.generate, 0

    def generate_exactly(input_ids: torch.Tensor, **options: Any) -> Any:
        nonlocal step
        step += 1
        count, mean, most = len(input_ids), settings["new_tokens"], settings["max_new_tokens"]
        lengths = forced.lengths(settings["seed"], step, count, mean, most)
        processor = _ExactLengths(lengths, input_ids.shape[1], end_id)
        return generate(input_ids=input_ids, logits_processor=[processor], **options)

    model.generate = generate_exactly


def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Score each completion with the reward function of slurmkit's side, and count its tokens."""
    CLOCK.add("completion_tokens", float(sum(map(len, completion_ids))))
    return [forced.reward(completion[0]["content"]) for completion in completions]


def main(settings_path: str, result_path: str) -> None:
    settings = json.loads(Path(settings_path).read_text())
    torch.set_num_threads(settings["threads"])
    tasks = [{"prompt": [{"role": "user", "content": question}]} for question in forced.QUESTIONS]
    completions = settings["prompts"] * settings["generations"]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    force_lengths(model, settings, tokenizer.eos_token_id)
    trainer = TimedTrainer(
        model=model,
        processing_class=tokenizer,
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
