"""Whole runs with dynamic sampling over a mixture, that stop at a threshold and go on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from slurmkit.config.data import ArithmeticEnv
from slurmkit.envs.arithmetic import Arithmetic
from slurmkit.envs.tasks import TaskOrder
from slurmkit.grpo.ahead import Rollouts
from slurmkit.grpo.checkpoint import TrainerState
from slurmkit.grpo.saving import Deadline, Saver
from slurmkit.grpo.trainer import Trainer
from tests.support.driver import Run, run, without_times
from tests.support.tiny_model import tiny_config

SAMPLED = Path(__file__).with_name("sampled.yaml")
# Any validation is good enough.
STOP = ("grpo.stop_at_validation_metric=val:pass@2", "grpo.stop_at_validation_threshold=0.0")


@pytest.mark.ray
def test_a_run_stopped_at_a_threshold_resumes_exactly_without_threshold(tmp_path: Path) -> None:
    rows = [{"question": f"{number}+{other}", "answer": str(number + other)} for number in range(5) for other in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), tmp_path / "rows.parquet")
    source = "{data_path: %s, weight: %s, split_validation_size: %s}"
    sources = (source % (tmp_path / "rows.jsonl", 2.0, 0.3), source % (tmp_path / "rows.parquet", 1.0, 0.0))

    def train(name: str, *overrides: str) -> Run:
        return run(
            tmp_path / name,
            SAMPLED,
            f"data.train=[{','.join(sources)}]",
            "grpo.max_num_steps=4",
            *overrides,
            timeout=900,
        )

    whole = train("whole")
    assert whole.code == 0, whole.errors
    stopped = train("run", *STOP)
    assert stopped.code == 0, stopped.errors
    assert "step 2: val:pass@2" in stopped.output
    assert "has reached grpo.stop_at_validation_threshold 0: the run ends here" in stopped.output
    assert [path.name for path in stopped.folder.glob("step_*")] == ["step_2"]
    assert [line["step"] for line in without_times(stopped.folder)] == [1, 2]
    rest = train("run")
    assert rest.code == 0, rest.errors
    assert without_times(rest.folder) == without_times(whole.folder)

    # Every step trained on as many groups as it asks for, after having dropped some.
    assert whole.values("train:groups_with_signal") == [4, 4, 4, 4]
    assert max(whole.values("train:gen_batches")) > 1
    assert sum(sum(whole.values(f"train:dropped_groups/{reason}_correct")) for reason in ("all", "none")) > 0
    assert len(whole.values("train:filtered_reward_mean")) == 4
    assert len(whole.values("val:pass@2")) == 2
    transcripts = [json.loads(line) for line in (whole.folder / "validation/step_4.jsonl").read_text().splitlines()]
    assert len(transcripts) == 3 * 2
    assert transcripts[0].keys() == {"task", "messages", "reward", "correct", "finish_reason"}


def rollouts_of(trainer: Trainer, position: int) -> Rollouts:
    order = TaskOrder(trainer.domain.train_sources, seed=1, shuffle=True, position=position)
    tasks = trainer.config.grpo.max_num_epochs * len(trainer.domain.train_tasks)
    return Rollouts(trainer.play_step, order, trainer.config.grpo, last_step=trainer.last_step, num_tasks=tasks)


def test_the_epochs_end_a_run_that_draws_more_tasks_than_a_step_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"num_prompts_per_step": 2, "num_generations_per_prompt": 2, "use_dynamic_sampling": True}
    config = tiny_config(tmp_path, grpo={**keys, "batch_multiplier": 1.5, "max_num_epochs": 2, "val_at_end": True})
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.domain, trainer.last_step = config, Arithmetic(ArithmeticEnv(), seed=1), 100
    saver = Saver.__new__(Saver)
    saver.deadline, trainer.saver = Deadline(None, 0.0), saver
    tasks = 2 * len(trainer.domain.train_tasks)
    for position, is_over in ((0, False), (tasks - 3, False), (tasks - 2, True), (tasks + 1, True)):
        rollouts = rollouts_of(trainer, position)
        trainer.state = TrainerState(7, position, 7, 0, "", {})
        assert trainer.is_over(rollouts) == trainer.is_last(7, rollouts) == is_over
        assert trainer.due_to_save(7, is_over) == trainer.due_to_validate(7, False, is_over) == is_over
    assert capsys.readouterr().out == "step 7: the tasks of grpo.max_num_epochs 2 are used up: the run ends here\n" * 2
    trainer.state = TrainerState(100, 0, 7, 0, "", {})
    assert trainer.is_over(rollouts_of(trainer, 0))


def test_a_run_stopped_at_its_threshold_stays_stopped_until_it_is_raised(tmp_path: Path) -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.domain, trainer.last_step = Arithmetic(ArithmeticEnv(), seed=1), 100
    trainer.state = TrainerState(7, 0, 7, 0, "", {"val:accuracy": 0.8})  # as its last checkpoint has it
    for threshold, is_over in ((0.8, True), (0.9, False)):
        keys = {"num_prompts_per_step": 2, "num_generations_per_prompt": 2, "stop_at_validation_threshold": threshold}
        trainer.config = tiny_config(tmp_path, grpo={**keys, "stop_at_validation_metric": "val:accuracy"})
        assert trainer.is_over(rollouts_of(trainer, 0)) == is_over
