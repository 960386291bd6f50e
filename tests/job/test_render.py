"""Rendering: the same bytes for the same spec, no value ever becomes code, and the file passes bash and shellcheck."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmkit.config.section import ValidationError
from slurmkit.errors import UserError
from slurmkit.job.render import render
from slurmkit.job.settle import Request, settle
from slurmkit.job.spec import JobSpec
from tests.support.requirements import HOSTILE, REPOSITORY


def spec(**keys: object) -> JobSpec:
    minimal = {"name": "t", "python": "/usr/bin/python3", "workdir": "/w", "run_dir": "/r", "command": ["true"]}
    return JobSpec.model_validate({**minimal, **keys})


def settled(**keys: object) -> JobSpec:
    """The example on eight nodes, with what people usually ask for beside it."""
    usual = {
        "nodes": 8,
        "time": "1-00:00:00",
        "partition": "gpu",
        "account": "alignment",
        "qos": "high",
        "gres": "gpu:h100:8",
        "cpus_per_task": 96,
        "exclusive": True,
        "comment": "grpo with eight nodes",
        "env": {"HF_HOME": "/scratch/hf", "NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "8"},
    }
    config = REPOSITORY / "examples/grpo_arithmetic.yaml"
    return settle(Request(config=config, flags={**usual, **keys}), Path("/w")).spec


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


SPECS = {
    "minimal": spec(),
    "full": spec(
        nodes=8,
        time="2-00:00:00",
        partition="gpu",
        account="me",
        gres="gpu:h100:8",
        cpus_per_task=16,
        mem="64G",
        exclusive=True,
        comment='a "b" \\ # c',
        env={"B": "2", "A": "it's $HOME"},
        setup=["module load cuda", "ulimit -c 0"],
        ray={"num_cpus": 4, "object_store_memory": 10**9, "start_timeout": 60},
        switches="2@10",
        requeue=True,
        sbatch={"licenses": "a:1", "spread-job": True, "hint": False},
        command=["bash", "-c", *HOSTILE],
    ),
    "realistic": settled(
        mem="0",
        signal="B:USR2@300",
        requeue=True,
        setup=["module load cuda/12.8", "ulimit -l unlimited"],
    ),
    **{
        f"in {runtime}": settled(
            container={"runtime": runtime, "image": "/images/rl.sqsh", "mounts": ["/data:/data:ro"]},
            secrets={"HF_TOKEN": {"env": "HF_TOKEN"}, "WANDB_API_KEY": {"env": "WANDB_API_KEY"}},
            setup=["ulimit -l unlimited"],
            epilogue=["date"],
        )
        for runtime in ("pyxis", "apptainer", "podman")
    },
    "until done": settled(
        until_done={"enabled": True},
        container={"runtime": "podman", "image": "/images/rl.sqsh", "mounts": ["/data:/data:ro"]},
        secrets={"HF_TOKEN": {"env": "HF_TOKEN"}, "WANDB_API_KEY": {"env": "WANDB_API_KEY"}},
    ),
    "example": settle(
        Request(config=REPOSITORY / "examples/grpo_arithmetic.yaml", flags={"nodes": 8}), Path("/w")
    ).spec,
}


@pytest.mark.parametrize("name", SPECS)
def test_a_rendered_file_passes_bash_and_shellcheck(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(render(SPECS[name]))
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--severity=warning", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SPECS)
def test_a_rendered_file_stays_short_enough_to_read(name: str) -> None:
    # The settled training configuration is data in it, as long as there are keys: a paragraph per section.
    config = len((SPECS[name].config or "").splitlines())
    assert len(render(SPECS[name]).splitlines()) - config <= 250
    assert config <= 60


def test_two_renders_in_different_processes_and_places_are_the_same_bytes(tmp_path: Path) -> None:
    imports = "import sys; sys.path.insert(0, sys.argv[1]); from tests.job.test_render import SPECS, render"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", f"{imports}; print(render(SPECS['full']))", REPOSITORY],
            cwd=directory,
            env={**os.environ, "PYTHONHASHSEED": seed, "LANG": "C", "TZ": zone},
            check=True,
            capture_output=True,
        ).stdout
        for directory, seed, zone in ((tmp_path, "1", "UTC"), ("/", "2", "Asia/Tokyo"))
    }
    assert len(outputs) == 1


def test_a_spec_that_differs_in_anything_renders_to_another_file() -> None:
    assert render(spec(config="grpo: {seed: 1}")) != render(spec(config="grpo: {seed: 2}"))


def test_directives_precede_the_first_command() -> None:
    lines = [line for line in render(SPECS["full"]).splitlines() if line]
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])


def test_directives_are_exactly_what_was_asked_for() -> None:
    assert directives(render(SPECS["full"])) == [
        "job-name=t",
        "nodes=8",
        "time=2-00:00:00",
        "partition=gpu",
        "account=me",
        "exclusive",
        "gres=gpu:h100:8",
        "cpus-per-task=16",
        "mem=64G",
        "switches=2@10",
        "requeue",
        'comment="a \\"b\\" \\\\ # c"',
        "ntasks-per-node=1",
        "output=/r/slurm-%j.out",
        "open-mode=append",
        "chdir=/w",
        "licenses=a:1",
        "spread-job",
    ]


def test_a_percent_sign_in_the_run_directory_is_not_a_file_pattern() -> None:
    assert 'output="/a b/100%%/slurm-%j.out"' in directives(render(spec(run_dir="/a b/100%")))


@pytest.mark.parametrize(
    ("runtime", "image"),
    [("pyxis", "/i.sqsh"), ("apptainer", "/i.sif"), ("podman", "/i"), ("podman", "docker.io/library/i")],
)
def test_further_options_of_runtime_and_srun_stand_quoted_before_what_runs(runtime: str, image: str) -> None:
    words = ["--env=A=it's $HOME", "-x", "--label=$(id)"]
    job = spec(
        srun=["--cpu-bind=none", "--comment=a b"], container={"runtime": runtime, "image": image, "options": words}
    )
    lines = render(job).splitlines()
    assert "sk_step+=(--cpu-bind=none '--comment=a b')" in lines
    at = lines.index(f"sk_container+=({shlex.join(words)})")
    image_at = [number for number, line in enumerate(lines) if image in line and "sk_container" in line][-1]
    assert at > image_at if runtime == "pyxis" else at < image_at, "options stand before the image"
    assert "sk_step+=(--cpu-bind" not in render(spec())


def settings_of(script: str) -> str:
    """The parts of a script that only assign: what runs, where, and the environment."""
    return (
        script[script.index("sk_command=(") : script.index("# ---- this attempt's own")]
        + script[script.index("# ---- environment") : script.index("sk_setup_node()")]
    )


def run_settings(job: JobSpec, tail: str) -> bytes:
    return subprocess.run(
        ["bash", "-c", f"set -u\n{settings_of(render(job))}\n{tail}"],
        env={"PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
        timeout=20,
    ).stdout


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{{ spec.nmae }}", "has no attribute 'nmae'"),
        ("{{ sepc.name }}", "'sepc' is undefined"),
        ("{{ spec.account }}", "a template puts out None"),
        ("{{ spec.exclusive }}", "a template puts out False"),
        ("{% if %}", "Expected an expression"),
        ("{% include 'nowhere.j2' %}", "nowhere.j2"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_broken_template_is_named_with_its_line(line: str, reason: str, tmp_path: Path) -> None:
    template = tmp_path / "job.sbatch.j2"
    template.write_text(f"#!/bin/bash\n{line}\n")
    with pytest.raises(UserError) as caught:
        render(spec(), (tmp_path,))
    assert f"{template}:2: the template cannot be rendered: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "signal"),
    [
        ({"time": "4:00:00"}, "B:USR2@300"),
        ({"time": "10"}, "B:USR2@150"),
        ({"time": "4:00:00", "signal": "B:USR1@60"}, "B:USR1@60"),
        ({}, None),
        ({"time": "0"}, None),
    ],
)
def test_a_run_that_goes_on_is_told_of_its_time_limit_and_never_requeued(
    keys: dict[str, object], signal: str | None
) -> None:
    job = settle(Request(command=("true",), flags={"until_done.enabled": True, **keys}), Path("/w"), {}).spec
    lines = directives(render(job))
    assert [line for line in lines if line.startswith("signal")] == ([f"signal={signal}"] if signal else [])
    assert "no-requeue" in lines
    plain = settle(Request(command=("true",), flags={"time": "10"}), Path("/w"), {}).spec
    assert not {"no-requeue", "signal=B:USR2@150"} & set(directives(render(plain)))


def test_training_is_watched_unless_the_job_says_otherwise() -> None:
    assert (settled().watchdog, settled(watchdog=None).watchdog, spec().watchdog) == (60, None, None)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(TEXT | st.sampled_from(HOSTILE), min_size=1, max_size=5))
def test_every_word_of_a_command_arrives_as_typed(words: list[str]) -> None:
    out = run_settings(spec(command=words), "printf '%s\\0' \"${sk_command[@]}\"")
    assert out == b"".join(word.encode() + b"\0" for word in words)


def test_carriage_return_reaches_the_job_but_not_the_script_text() -> None:
    text = "it's\r\n\\r $HOME\r"
    job = spec(env={"A": text}, command=[text])
    assert "\r" not in render(job)
    assert run_settings(job, 'printf %s "$A" "${sk_command[0]}"') == (text * 2).encode()


@settings(max_examples=60, deadline=None)
@given(value=TEXT | st.sampled_from(HOSTILE))
def test_every_environment_value_arrives_as_typed(value: str) -> None:
    assert run_settings(spec(env={"lower_Case": value}), 'printf %s "$lower_Case"') == value.encode()


@pytest.mark.parametrize(
    ("keys", "gpus"),
    [
        ({"gres": "gpu:8"}, 8),
        ({"gres": "gpu:4090"}, 4090),
        ({"gres": "gpu:4090:8"}, 8),
        ({"gres": "gpu:2080ti:2"}, 2),
        ({"gres": "gpu:1g.5gb:2"}, 2),
        ({"gres": "gpu:3090:2,gpu:h100:1"}, 3),
        ({"gpus_per_node": "3090:4"}, 4),
        ({"gpus": "2080ti:2"}, 2),
    ],
)
def test_a_gpu_type_may_begin_with_a_digit(keys: dict[str, str], gpus: int) -> None:
    job = spec(**keys)
    assert job.total_gpus == gpus
    [(key, value)] = keys.items()
    assert f"{key.replace('_', '-')}={value}" in directives(render(job))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "a/b"}, "cannot be a run's name"),
        ({"name": "-x"}, "cannot be a run's name"),
        ({"comment": "a\nrm -rf /"}, "line break"),
        ({"partition": ""}, "is empty"),
        ({"comment": "x" * 9000}, "9000 bytes"),
        ({"time": "1h"}, "is not a Slurm time"),
        ({"mem": "64 GB"}, "is not a size"),
        ({"gres": "gpu:"}, "is not a GRES"),
        ({"gres": "gpu:2080ti"}, "is not a GRES such as gpu:8, gpu:h100:8 or gpu:2080ti:1"),
        ({"gres": "gpu:8", "gpus_per_node": 8}, "both ask for GPUs"),
        ({"env": {"1A": "x"}}, "cannot name an environment variable"),
        ({"env": {"SLURM_JOB_ID": "1"}}, "SLURM_JOB_ID belongs to Slurm"),
        ({"env": {"A": "x\0"}}, "NUL"),
        ({"env": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY looks like a secret"),
        ({"sbatch": {"array": "1-3"}}, "use the key array"),
        ({"sbatch": {"job-name": "x"}}, "use the key name"),
        ({"sbatch": {"--hold": True}}, "not a long option"),
        ({"command": []}, "at least 1 item"),
        ({"nodes": 0}, "greater than or equal to 1"),
        ({"nodes": True}, "valid integer"),
        ({"run_dir": "relative"}, "not an absolute path"),
        ({"run_dir": "/a\\b"}, "backslash"),
        ({"container": {"runtime": "Docker"}}, "should match pattern"),
        ({"ray": {"num_cpus": 0}}, "greater than or equal to 1"),
        ({"until_done": {"max_attempts": 3}}, "add --until-done"),
        ({"until_done": {"enabled": False, "max_hours": 2}}, "add --until-done"),
        ({"until_done": {"enabled": True}, "array": "0-3"}, "until_done and array exclude each other"),
        ({"until_done": {"enabled": True}, "requeue": True}, "until_done and requeue exclude each other"),
        ({"watchdog": 0}, "greater than 0"),
        ({"srun": ["cpu-bind"]}, "is not an option in one word, such as --NAME or --NAME=VALUE"),
        ({"srun": ["--"]}, "is not an option in one word"),
        ({"srun": ["--ntasks=2"]}, "--ntasks is set by slurmkit itself"),
        ({"srun": ["--expo=NONE"]}, "--expo is set by slurmkit itself"),
        ({"srun": ["-N2"]}, "-N2 is set by slurmkit itself"),
        ({"srun": ["--container-mounts=/a"]}, "options of pyxis go into container.options"),
        ({"srun": ["--comment=hf_abcdefghijklmnopqrstuvwx"]}, "holds what looks like a Hugging Face token"),
        (
            {"container": {"runtime": "podman", "image": "/i", "options": ["--env=MY_API_KEY=x"]}},
            "gives MY_API_KEY a value",
        ),
        ({"container": {"options": ["--nv"]}}, "options need a container"),
    ],
)
def test_a_value_that_no_script_can_carry_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**keys)
    assert message in str(caught.value)
