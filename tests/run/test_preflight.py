"""What submit finds out before it asks the queue: real files, full and read-only file systems, a real Slurm."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.model import FromScratch
from slurmkit.job.settle import Request, Settled, settle
from slurmkit.job.spec import JobSpec
from slurmkit.run.footprint import parameters_in, parameters_of
from slurmkit.run.forecast import cost, start
from slurmkit.run.preflight import look
from slurmkit.slurm.client import Estimate
from tests.support.cluster import Cluster
from tests.support.requirements import missing

CONFIG = """\
env: {name: arithmetic}
policy:
  from_scratch: {supervised_steps: 1}
grpo: {num_prompts_per_step: 32, max_num_epochs: 2}
checkpointing:
  keep_top_k: 3
cluster: {gpus_per_node: 0}
"""


def ask(here: Path, *overrides: str, command: tuple[str, ...] = (), flags: dict[str, Any] | None = None) -> Settled:
    """A settled job in `here`: the command, or CONFIG with the overrides."""
    config = None
    if not command:
        config = here / "train.yaml"
        config.write_text(CONFIG)
    return settle(Request(config=config, overrides=overrides, command=command, flags=flags or {}), here)


def problems(settled: Settled) -> list[str]:
    return [remark.text for remark in look(settled) if remark.is_problem]


def warnings(settled: Settled) -> list[str]:
    return [remark.text for remark in look(settled) if not remark.is_problem]


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with these options. Root may write to any folder, but not to a file system that is read-only."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk {len(made)}"
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        if done.returncode != 0:
            missing(f"mount as root: {done.stderr.strip()}")
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", path], check=True)


def test_of_a_job_that_lacks_nothing_nothing_is_said(shared_path: Path) -> None:
    assert look(ask(shared_path, command=("true",))) == []
    assert look(ask(shared_path)) == []


@pytest.mark.parametrize(
    ("flags", "command", "message"),
    [
        ({"workdir": "{here}/gone"}, ["true"], "workdir: {here}/gone (command line: workdir) is missing"),
        ({"workdir": "{here}/file"}, ["true"], "workdir: {here}/file (command line: workdir) is no folder"),
        ({"python": "{here}/gone"}, ["true"], "python: {here}/gone (command line: python) is missing"),
        ({"python": "{here}/file"}, ["true"], "python: {here}/file (command line: python) cannot be executed"),
        ({}, ["./gone"], "command: ./gone (command line) is missing; a relative path begins at workdir {here}"),
        ({}, ["./file"], "command: ./file (command line) is not executable"),
        ({}, ["{here}/folder"], "command: {here}/folder (command line) is no file"),
        ({"run_dir": "{here}/file/x"}, ["true"], "{here}/file is a file, not a folder"),
        ({"run_dir": "{here}/link/x"}, ["true"], "{here}/link is a link that leads nowhere"),
    ],
)
def test_what_is_not_there_is_refused_with_key_value_and_origin(
    shared_path: Path, flags: dict[str, str], command: list[str], message: str
) -> None:
    (shared_path / "file").touch()
    (shared_path / "folder").mkdir()
    (shared_path / "link").symlink_to("nowhere")

    def here(text: str) -> str:
        return text.replace("{here}", str(shared_path))

    settled = ask(
        shared_path, command=tuple(map(here, command)), flags={key: here(value) for key, value in flags.items()}
    )
    (said,) = problems(settled)
    assert here(message) in said


def test_in_a_container_the_host_is_asked_for_its_image_and_mounts_only(shared_path: Path) -> None:
    container = {"runtime": "podman", "image": "/no/image", "mounts": ["/no/mount:/data", f"{shared_path}"]}
    flags = {"container": {**container, "check": ["image", "mounts"]}, "python": "/opt/venv/bin/python"}
    said = problems(ask(shared_path, command=("/opt/train",), flags=flags))
    assert said == [
        "container.image: /no/image: no such file (command line: container)",
        "container.mounts: /no/mount:/data: /no/mount: no such file or folder (command line: container)",
    ]


def test_a_program_that_another_job_or_setup_may_still_make_is_a_warning(shared_path: Path) -> None:
    for flags in ({"dependency": "afterok:1"}, {"setup": ["make"]}):
        settled = ask(shared_path, command=("./later",), flags=flags)
        assert problems(settled) == []
        assert "command: ./later (command line) is missing" in warnings(settled)[0]


def test_a_program_that_is_not_on_path_is_a_warning(shared_path: Path) -> None:
    (said,) = warnings(ask(shared_path, command=("train.py",)))
    assert said.endswith("is not on this machine's PATH: a file is named with its path, as ./train.py")


def test_an_interpreter_without_ray_is_a_warning(shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    bare = shared_path / "python3"
    bare.symlink_to(sys.executable)
    (said,) = warnings(ask(shared_path, command=("true",), flags={"python": str(bare)}))
    assert "ray is neither beside it nor on PATH" in said


def test_folders_that_each_node_has_for_itself_are_a_warning(here: Path) -> None:
    settled = ask(here, command=("true",), flags={"run_dir": "/dev/shm/x", "workdir": "/tmp"})
    said = warnings(settled)
    assert problems(settled) == []
    assert said[0].startswith(
        "workdir: /tmp (command line: workdir) lies in /tmp, which on most clusters each node has"
    )
    assert any(line.startswith("run_dir: /dev/shm/x (command line: run_dir) lies in /dev/shm") for line in said)


def test_a_run_directory_on_a_read_only_file_system_is_refused(
    shared_path: Path, file_system: Callable[[str], Path]
) -> None:
    disk = file_system("ro")
    (said,) = problems(ask(shared_path, command=("true",), flags={"run_dir": f"{disk}/deep/er"}))
    assert said == (
        f"run_dir: {disk}/deep/er (command line: run_dir): {disk} is not writable: give another --results-dir"
    )


@pytest.mark.parametrize(
    ("options", "problem", "warning"),
    [
        ("size=20m", "has 21 MB free, the run needs 100 MB (scripts and logs)", None),
        ("size=150m", None, "has 157 MB free, of which the run needs 100 MB (scripts and logs)"),
        ("size=1g,nr_inodes=500", "but room for 499 files only", None),
        ("size=1g", None, None),
    ],
)
def test_a_full_file_system_is_refused_and_a_nearly_full_one_is_a_warning(
    shared_path: Path, file_system: Callable[[str], Path], options: str, problem: str | None, warning: str | None
) -> None:
    disk = file_system(options)
    settled = ask(shared_path, command=("true",), flags={"run_dir": f"{disk}/x"})
    about_space = [line for line in warnings(settled) if "lies in /tmp" not in line]
    for expected, said in ((problem, problems(settled)), (warning, about_space)):
        assert len(said) == (expected is not None), said
        assert expected is None or expected in said[0]


# 99 million parameters: 1.19 GB a checkpoint, and 0.4 GB for the model that is made.
LARGE = ("policy.from_scratch.hidden_size=1024", "policy.from_scratch.num_hidden_layers=16",
         "policy.from_scratch.intermediate_size=640")  # fmt: skip


def test_checkpoints_that_do_not_fit_are_refused_and_unmade_ones_ignored(
    shared_path: Path, file_system: Callable[[str], Path]
) -> None:
    flags = {"results_dir": str(file_system("size=4g"))}
    (said,) = problems(ask(shared_path, *LARGE, flags=flags))
    assert "has 4.29 GB free, the run needs 6.45 GB (5 more checkpoints of 1.19 GB at a time" in said
    assert f"checkpointing.keep_top_k: 3 ({shared_path}/train.yaml:6)" in said
    assert problems(ask(shared_path, *LARGE, "checkpointing.keep_top_k=1", flags=flags)) == []
    assert problems(ask(shared_path, *LARGE, "grpo.max_num_steps=11", flags=flags)) == [], "2 saves"
    # Two epochs of 1000 problems are 62 steps of 32, and so 7 saves; without a limit all of them stay.
    (said,) = problems(ask(shared_path, *LARGE, "checkpointing.keep_top_k=null", flags=flags))
    assert "7 more checkpoints" in said
    assert problems(ask(shared_path, *LARGE, "checkpointing.enabled=false", flags=flags)) == []


def test_checkpoints_that_are_there_already_need_no_room(shared_path: Path, file_system: Callable[[str], Path]) -> None:
    disk = file_system("size=4g")
    for step in (10, 20, 30):
        (disk / f"train/step_{step}").mkdir(parents=True)
    assert problems(ask(shared_path, *LARGE, flags={"results_dir": str(disk)})) == []


def test_a_checkpoint_of_a_folder_s_model_is_estimated_from_its_weights(
    shared_path: Path, file_system: Callable[[str], Path]
) -> None:
    model = model_folder(shared_path / "model", size=2 * 10**9)
    flags = {"results_dir": str(file_system("size=4g"))}
    (said,) = problems(ask(shared_path, "~policy.from_scratch", f"policy.model_name='{model}'", flags=flags))
    assert "5 more checkpoints of 12 GB" in said, "a billion parameters in bfloat16"


def test_parameter_count_of_a_from_scratch_model_is_known_in_advance(tmp_path: Path) -> None:
    from tests.support.tiny_model import SIZES, make_tiny_model

    folder = make_tiny_model(tmp_path / "model")
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    made = sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    assert parameters_of(FromScratch.model_validate(SIZES)) == made
    assert made <= parameters_in(folder) < 1.1 * made, "the file has a header"


def model_folder(folder: Path, size: int = 0, leave_out: str = "") -> Path:
    """What from_pretrained opens, with weights that take no room on the disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "model.safetensors").touch()
    os.truncate(folder / "model.safetensors", size)
    if leave_out:
        (folder / leave_out).unlink()
    return folder


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no weights"),
        ("tokenizer_config.json", "has no chat template"),
    ],
)
def test_a_model_s_folder_that_would_not_open_is_refused(shared_path: Path, leave_out: str, message: str) -> None:
    model_folder(shared_path / "model", leave_out=leave_out)
    overrides = ("~policy.from_scratch", "policy.model_name=model")
    (said,) = problems(ask(shared_path, *overrides))
    assert said.startswith("policy.model_name: model (command line: policy.model_name=model): ")
    assert message in said
    # A run that goes on opens its own checkpoint.
    (shared_path / "results/train/step_3").mkdir(parents=True)
    (shared_path / "results/train/step_3/manifest.json").touch()
    assert problems(ask(shared_path, *overrides)) == []


def test_own_chat_template_replaces_the_models_and_must_exist(shared_path: Path) -> None:
    model_folder(shared_path / "model", leave_out="tokenizer_config.json")
    overrides = ("~policy.from_scratch", "policy.model_name=model", "policy.tokenizer.chat_template=own.jinja")
    (said,) = problems(ask(shared_path, *overrides))
    assert said.startswith("policy.tokenizer.chat_template: own.jinja (command line: policy.tokenizer.chat_template=")
    assert said.endswith(f": no such file; a relative path begins at workdir {shared_path}")
    (shared_path / "own.jinja").touch()
    assert problems(ask(shared_path, *overrides)) == []


def test_a_name_on_the_hub_is_left_alone_unless_the_hub_must_not_be_asked(
    shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    overrides = ("~policy.from_scratch", "policy.model_name=Qwen/Qwen3-0.6B")
    flags = {"env.HF_HOME": str(shared_path / "hf")}
    assert problems(ask(shared_path, *overrides, flags=flags)) == []
    flags["env.HF_HUB_OFFLINE"] = "1"
    (said,) = problems(ask(shared_path, *overrides, flags=flags))
    snapshots = shared_path / "hf/hub/models--Qwen--Qwen3-0.6B/snapshots"
    assert said.endswith(f"it must be in the cache, where it is not: {snapshots}")
    model_folder(snapshots / "0123")
    assert problems(ask(shared_path, *overrides, flags=flags)) == []
    (said,) = problems(ask(shared_path, "~policy.from_scratch", "policy.model_name=/gone/model"))
    assert "policy.model_name: /gone/model (command line: policy.model_name=/gone/model): no such folder" in said


def test_a_log_dir_that_cannot_be_used_is_refused(shared_path: Path) -> None:
    (taken := shared_path / "taken").mkdir()
    (taken / "metrics.jsonl").touch()
    (shared_path / "file").touch()
    for folder, said in (
        ("taken", "it holds metrics.jsonl of another run"),
        ("file/x", f"{shared_path}/file is not a"),
    ):
        [problem] = problems(ask(shared_path, f"logger.log_dir={folder}"))
        origin = f"(command line: logger.log_dir={folder}): "
        assert problem.startswith(f"logger.log_dir: {shared_path}/{folder} {origin}{said}")
    assert problems(ask(shared_path, "logger.log_dir=new/folder")) == []
    flags = {"container": {"runtime": "podman", "image": "x", "check": []}, "python": "/opt/venv/bin/python"}
    [problem] = problems(ask(shared_path, "logger.log_dir=/logs", flags=flags))
    assert problem == (
        "logger.log_dir: /logs (command line: logger.log_dir=/logs) is not in the container: add it to "
        "container.mounts, with the same path inside"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no task"),
        ("\n  \n", "holds no task"),
        ("PAR1\x15", "the first line is not JSON"),
        ("[1, 2]\n", "the first line is not a JSON object"),
    ],
)
def test_tasks_that_cannot_be_read_are_refused(shared_path: Path, text: str, message: str) -> None:
    (shared_path / "good.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}\n' * 40)
    (shared_path / "bad.jsonl").write_text(text)
    overrides = ("env.name=math", "data.train.data_path=good.jsonl", "data.validation.data_path=bad.jsonl")
    (said,) = problems(ask(shared_path, *overrides))
    origin = "command line: data.validation.data_path=bad.jsonl"
    assert said.startswith(f"data.validation.data_path: {shared_path}/bad.jsonl ({origin}): {message}")


def test_each_source_of_a_list_is_looked_at_as_what_it_is(shared_path: Path) -> None:
    rows = '{"question": "1+1", "answer": "#### 2"}\n' * 7
    (shared_path / "good.jsonl").write_text(rows)
    (shared_path / "good.parquet").write_text("PAR1")
    (shared_path / "bad.parquet").write_text(rows)
    (shared_path / "folder").mkdir()

    def said(*paths: str) -> list[str]:
        sources = ",".join(f"{{data_path: {path}, split_validation_size: 0.1}}" for path in paths)
        return problems(ask(shared_path, "env.name=math", f"data.train=[{sources}]"))

    (problem,) = said("good.jsonl", "bad.parquet")
    assert problem.startswith(f"data.train.1.data_path: {shared_path}/bad.parquet (command line: data.train=[")
    assert problem.endswith("): is no Parquet file")
    (problem,) = said("good.jsonl", "good.jsonl")
    assert "grpo.num_prompts_per_step: 32" in problem
    # Of these only the trainer can tell how many tasks they hold.
    assert said("good.jsonl", "good.parquet") == said("good.jsonl", "folder") == []
    assert said("'openai/gsm8k', split: train", "good.jsonl") == []


def test_fewer_tasks_than_one_step_draws_are_refused(shared_path: Path) -> None:
    (shared_path / "tasks.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}\n\n' * 15)
    overrides = ("env.name=math", "data.train.data_path=tasks.jsonl", "data.validation.data_path=tasks.jsonl")
    (said,) = problems(ask(shared_path, *overrides))
    assert f"grpo.num_prompts_per_step: 32 ({shared_path}/train.yaml:4) is more than the training tasks" in said
    assert problems(ask(shared_path, *overrides, "grpo.max_num_epochs=3")) == []


@pytest.mark.parametrize(
    ("flags", "overrides", "message"),
    [
        ({"gpus_per_node": "8"}, ["cluster.gpus_per_node=6"], "leaves 2 of the 8 GPUs on each node idle"),
        ({"gres": "gpu:h100:8"}, ["cluster.gpus_per_node=6"], "asks for with gres: gpu:h100:8 (command line: gres)"),
        ({"gpus": "16", "nodes": 2}, ["~cluster.gpus_per_node"], "ask for gpus_per_node 8 instead"),
        ({}, ["~cluster.gpus_per_node"], "so the run trains on the CPU: ask for some (--gpus-per-node 8)"),
        ({"gres": "shard:4"}, ["~cluster.gpus_per_node"], "so the run trains on the CPU"),
        ({"exclusive": True}, ["~cluster.gpus_per_node"], "cluster.gpus_per_node: 1 (default), and how many GPUs"),
        ({"time": "4"}, [], "time: 4 (command line: time) is 4 min, less than bringing Ray up may take"),
        ({}, ["logger.wandb_enabled=true"], "logger.wandb.mode: online (default) needs a key"),
        ({"gpus_per_node": "8"}, ["~cluster.gpus_per_node"], None),
        ({"env.NETRC": "/etc/hostname"}, ["logger.wandb_enabled=true"], None),
        ({"gpus": "8"}, ["~cluster.gpus_per_node"], None),
        ({"time": "4", "ray.start_timeout": 60}, [], None),
        ({"time": "0"}, [], None),
        ({}, ["logger.wandb_enabled=true", "logger.wandb.mode=offline"], None),
    ],
)
def test_what_was_probably_not_meant_is_a_warning(
    shared_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any],
    overrides: list[str],
    message: str | None,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    flags = {"cpus_per_task": 2, **flags}
    monkeypatch.setenv("NETRC", str(shared_path / "none"))
    settled = ask(shared_path, *overrides, flags=flags)
    assert problems(settled) == []
    said = warnings(settled)
    assert len(said) == (message is not None), said
    assert message is None or message in said[0]


def spec(**keys: Any) -> JobSpec:
    paths = {"python": "python3", "workdir": "/x", "run_dir": "/x/y", "command": ["true"]}
    return JobSpec.model_validate({"name": "x", **paths, **keys})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"nodes": 8, "gres": "gpu:8", "time": "4:00:00"}, "8 nodes × 8 GPUs × 4 h = 256 GPU-hours at most"),
        ({"nodes": 1, "gpus_per_node": "h100:1", "time": "30"}, "1 node × 1 GPU × 30 min = 0.5 GPU-hours at most"),
        ({"nodes": 2, "gpus": "12", "time": "1-12"}, "12 GPUs × 36 h = 432 GPU-hours at most"),
        ({"nodes": 2, "time": "1:30:00"}, "2 nodes × 1.5 h = 3 node-hours at most"),
        ({"nodes": 100, "gres": "gpu:8", "time": "2-0"}, "100 nodes × 8 GPUs × 48 h = 38,400 GPU-hours at most"),
        ({"nodes": 2, "gres": "gpu:8"}, "2 nodes × 8 GPUs: 16 GPU-hours per hour; no time limit is asked for"),
        ({"nodes": 2, "time": "0"}, "2 nodes: 2 node-hours per hour; no time limit is asked for"),
        ({"exclusive": True, "time": "1:0:0"}, "1 whole node × 1 h = 1 node-hours at most"),
        (
            {"exclusive": True, "gres": "gpu:4", "time": "1:0:0"},
            "1 whole node × 4 GPUs × 1 h = 4 GPU-hours at most, and the GPUs of these nodes that it leaves",
        ),
        ({"array": "0-7%2", "gres": "gpu:1", "time": "60"}, "8 jobs × 1 node × 1 GPU × 1 h = 8 GPU-hours at most"),
        ({"array": "0-15:4,20", "time": "60"}, "5 jobs × 1 node × 1 h = 5 node-hours at most"),
    ],
)
def test_the_cost_is_told_in_one_line(keys: dict[str, Any], said: str) -> None:
    assert cost(spec(**keys)) == said


def test_the_start_is_now_or_when_slurm_expects_it() -> None:
    def after(**time: int) -> Estimate:
        return Estimate((datetime.now() + timedelta(**time)).isoformat(timespec="seconds"), "node1", "batch")

    assert start(spec(), after(seconds=5)) == "now"
    later = after(hours=1)
    assert start(spec(), later) == f"estimated {later.start}"
    assert start(spec(), Estimate(None, "", "")) == "unknown: Slurm gives no estimate"
    assert start(spec(dependency="afterok:7"), later) == "when its dependency allows: afterok:7"
    assert start(spec(sbatch={"hold": True}), later) == "when it is released: scontrol release JOBID"


def test_submit_lists_all_that_speaks_against_a_job_and_writes_nothing(cluster: Cluster, shared_path: Path) -> None:
    (shared_path / "slurmkit.yaml").write_text("workdir: gone\n")
    done = cluster.slurmkit(
        shared_path, "submit", "-N", "9", "--set", "python=/no/python", "--results-dir", "slurmkit.yaml",
        "--set", "secrets.HF_TOKEN.env=NOT_SET",
        "--", "./missing",
    )  # fmt: skip
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert [line.removeprefix("error: ").partition(":")[0] for line in lines] == [
        "workdir", "python", "run_dir", "command", "Slurm would refuse this job", "secrets.HF_TOKEN",
    ]  # fmt: skip
    assert f"({shared_path}/slurmkit.yaml:1)" in lines[0]
    assert [path.name for path in shared_path.iterdir()] == ["slurmkit.yaml"]


def empty(cluster: Cluster) -> None:
    """Wait until no job of another test is left."""
    deadline = time.monotonic() + 120
    while cluster.ask("squeue", "-h"):
        assert time.monotonic() < deadline, cluster.ask("squeue")
        time.sleep(0.2)


def test_cost_and_start_are_printed_with_the_job_and_warnings_beside_it(cluster: Cluster, shared_path: Path) -> None:
    empty(cluster)
    job = ["-N", "2", "--gres", "gpu:h100:8", "--cpus-per-task", "1", "--time", "5", "--", "true"]
    forecast = ["cost           2 nodes × 8 GPUs × 5 min = 1.3 GPU-hours at most", "start          now"]
    dry = cluster.slurmkit(shared_path, "submit", "--dry-run", *job)
    assert dry.stdout == cluster.slurmkit(shared_path, "render", *job).stdout
    assert dry.stderr.splitlines()[1:3] == forecast
    done = cluster.slurmkit(shared_path, "submit", *job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:3] == forecast
    assert done.stderr.startswith("warning: time: 5 (command line: time) is 5 min")
    cluster.ask("scancel", "--name", "true")


def test_the_start_on_a_full_cluster_is_slurm_s_own_estimate(cluster: Cluster, shared_path: Path) -> None:
    empty(cluster)
    job = cluster.ask("sbatch", "--parsable", "-N4", "--exclusive", "-t30", "-o/dev/null", "--wrap", "sleep 99").strip()
    try:
        cluster.ask(
            "timeout", "30", "bash", "-c", f"until [[ $(squeue -h -o%T -j {job}) == RUNNING ]]; do sleep .2; done"
        )
        dry = cluster.slurmkit(shared_path, "submit", "--dry-run", "--time", "1:00:00", "--", "true")
        (line,) = [line for line in dry.stderr.splitlines() if line.startswith("start ")]
        wait = datetime.fromisoformat(line.removeprefix("start          estimated ")) - datetime.now()
        assert timedelta(minutes=20) < wait < timedelta(minutes=31)
    finally:
        cluster.ask("scancel", job)
