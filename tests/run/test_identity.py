"""What a run goes on with, and what needs a name of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slurmkit.errors import UserError
from slurmkit.job.settle import Request, Settled, settle
from slurmkit.run.directory import RunDirectory, jobs_of
from slurmkit.run.preflight import look
from tests.support.requirements import SLURMKIT

CONFIG = "env: {name: arithmetic}\npolicy: {from_scratch: {}}\ngrpo: {max_num_steps: 5}\n"


def settled(here: Path, *overrides: str, nodes: int = 1, time: str = "10") -> Settled:
    (here / "train.yaml").write_text(CONFIG)
    flags = {"nodes": nodes, "time": time, "name": "run"}
    return settle(Request(config=here / "train.yaml", overrides=overrides, flags=flags), here, {"HOME": str(here)})


@pytest.fixture
def directory(here: Path) -> RunDirectory:
    """Of a training run that was submitted once."""
    first = settled(here)
    directory = RunDirectory(Path(first.spec.run_dir))
    assert first.spec.config is not None
    directory.prepare({"job.sbatch": "first", "config.yaml": first.spec.config})
    directory.add_attempt(first.identity, {"job_id": "1"})
    return directory


def test_a_run_goes_on_with_other_nodes_time_and_more_steps(here: Path, directory: RunDirectory) -> None:
    changed = ("grpo.max_num_steps=9", "logger.wandb.project=x", "policy.generation.max_batch_size=3")
    directory.refuse_other(settled(here, *changed, nodes=4, time="1:00:00"))


def test_changed_training_settings_are_refused_with_each_key_and_values(here: Path, directory: RunDirectory) -> None:
    other = settled(here, "grpo.seed=7", "policy.from_scratch.hidden_size=64", "grpo.max_num_steps=9")
    with pytest.raises(UserError) as refused:
        directory.refuse_other(other)
    text = str(refused.value)
    assert "grpo.seed: 7 (command line: grpo.seed=7), and the run has 42" in text
    assert "policy.from_scratch.hidden_size: 64 (command line: policy.from_scratch.hidden_size=64)" in text
    assert "max_num_steps" not in text


def test_a_training_run_does_not_become_a_command(here: Path, directory: RunDirectory) -> None:
    with pytest.raises(UserError, match="holds a run with another training configuration"):
        directory.refuse_other(settle(Request(command=("true",), flags={"name": "run"}), here, {}))


def test_failed_submission_keeps_the_files_of_an_earlier_attempt(here: Path, directory: RunDirectory) -> None:
    again = RunDirectory(directory.path)
    before = (directory.path / "config.yaml").read_text()
    again.prepare({"job.sbatch": "second", "config.yaml": "x: 1\n", "new": ""})
    again.undo()
    assert (directory.path / "job.sbatch").read_text() == "first"
    assert (directory.path / "config.yaml").read_text() == before
    assert sorted(path.name for path in directory.path.iterdir()) == [
        "attempts",
        "config.yaml",
        "job.sbatch",
        "run.json",
    ]


def test_follow_ups_are_jobs_of_the_run(directory: RunDirectory) -> None:
    for name, following in (("1.0", "7"), ("7.0", "9")):
        (directory.path / "attempts" / name).mkdir()
        (directory.path / "attempts" / name / "next").write_text(f"{following}\n")
    (directory.path / "attempts/latest").symlink_to("7.0")
    assert jobs_of(directory.path) == {"1", "7", "9"}


def test_starting_anew_over_checkpoints_is_refused_before_the_queue(here: Path, directory: RunDirectory) -> None:
    anew = settled(here, "checkpointing.resume=never")
    assert not [remark for remark in look(anew) if "resume" in remark.text]
    (directory.path / "step_3").mkdir()
    (directory.path / "step_3/manifest.json").write_text("{}")
    [problem] = [remark.text for remark in look(anew) if remark.is_problem and "resume" in remark.text]
    assert "holds step_3, which starting anew would overwrite" in problem
    assert not [remark for remark in look(settled(here)) if "resume" in remark.text]


def render(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (here / "train.yaml").write_text(CONFIG)
    return subprocess.run([SLURMKIT, "render", *words], cwd=here, capture_output=True, text=True, timeout=60)


def test_resume_is_a_word_or_a_checkpoint_whose_path_is_made_absolute(here: Path) -> None:
    assert "resume: never" in render(here, "--config", "train.yaml", "--resume", "never").stdout
    folder = here / "is, [here]" / "step_3"
    folder.mkdir(parents=True)
    refused = render(here, "--config", "train.yaml", "--resume", str(folder.relative_to(here)))
    assert refused.returncode == 2
    assert f"checkpointing.resume: '{folder}' (command line: resume) is no checkpoint" in refused.stderr
    (folder / "manifest.json").write_text("{}")
    done = render(here, "--config", "train.yaml", "--resume", str(folder.relative_to(here)))
    assert f'resume: "{folder}"' in done.stdout, done.stderr


def test_resume_without_a_training_configuration_is_refused(here: Path) -> None:
    done = render(here, "--resume", "auto", "--", "true")
    assert done.returncode == 2
    assert "--resume auto says where slurmkit's trainer goes on, and this job runs a command of its own" in done.stderr
