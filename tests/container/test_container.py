"""The container section: what is refused, expanded and found missing, and what the templates make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmkit.config.section import ValidationError
from slurmkit.job.container import expand, expand_places, missing_parts
from slurmkit.job.render import render
from slurmkit.job.spec import JobSpec
from tests.support.requirements import HOSTILE

IMAGES = {"pyxis": "nvcr.io#nvidia/pytorch:25.01", "apptainer": "docker://rayproject/ray:2.60", "podman": "ray:2.60"}
RUNTIMES = list(IMAGES)


def spec(container: dict[str, Any], **keys: Any) -> JobSpec:
    minimal = {"name": "t", "python": "python3", "workdir": "/w", "run_dir": "/w/results/t", "command": ["true"]}
    return JobSpec.model_validate({**minimal, **keys, "container": container})


def words(job: JobSpec) -> list[str]:
    """The array `sk_container` as bash makes it from the rendered script."""
    script = render(job)
    start = script.index("\n", script.index("step+=(--cpus-per-task"))
    part = script[start : script.index('"${sk_step[@]}" "${sk_container[@]}"')]
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; SK_A=1; RAY_B=2\n{part}\nprintf '%s\\0' \"${{sk_container[@]}}\""],
        env={"PATH": os.environ["PATH"], "HOME": "/home/me"},
        check=True,
        capture_output=True,
        timeout=20,
    )
    return done.stdout.decode().split("\0")[:-1]


def value_of(option: str, arguments: list[str]) -> list[str]:
    return [word.removeprefix(f"{option}=") for word in arguments if word.startswith(f"{option}=")]


TEXT = st.text(st.characters(exclude_characters="\0/:", exclude_categories=["Cs"]), min_size=1, max_size=12)
PATH = st.builds("/x{}/{}".format, TEXT, TEXT) | st.sampled_from([f"/a{text}/b" for text in HOSTILE])


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(max_examples=80, deadline=None)
@given(image=PATH, source=PATH, target=PATH, workdir=PATH, read_only=st.booleans())
def test_every_byte_of_image_mounts_and_workdir_arrives_or_is_refused(
    runtime: str, image: str, source: str, target: str, workdir: str, read_only: bool
) -> None:
    keys = {"image": image, "mounts": [f"{source}:{target}" + ":ro" * read_only], "workdir": workdir}
    try:
        job = spec({"runtime": runtime, **keys})
    except ValidationError:
        return
    arguments = words(job)
    mount = f"{source}:{os.path.normpath(target)}" + ":ro" * read_only
    if runtime == "pyxis":
        assert value_of("--container-image", arguments) == [image]
        assert value_of("--container-workdir", arguments) == [workdir]
        assert mount in value_of("--container-mounts", arguments)[0].split(",")
    elif runtime == "apptainer":
        assert arguments[-1] == image
        assert value_of("--pwd", arguments) == [workdir]
        assert mount in value_of("--bind", arguments)
    else:
        assert arguments[-2:] == ["--rootfs", f"{image}:O"]
        assert value_of("--workdir", arguments) == [workdir]
        assert mount in value_of("--volume", arguments)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("on", [False, True])
def test_a_rendered_file_passes_bash_and_shellcheck_within_250_lines(runtime: str, on: bool, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"mount_home": on, "writable": on, "name": "kept" if on and runtime == "pyxis" else None}
    job = spec(
        {"runtime": runtime, "image": "/a b/root", "mounts": ["/data", "/it's:/d:ro"] * on, **keys},
        python="/opt/it's/python3" if on else "python3",
        env={"A": "1"} if on else {},
        gpus=8 if on else None,
    )
    path = tmp_path / "job.sbatch"
    path.write_text(render(job))
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--severity=warning", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(path.read_text().splitlines()) <= 250


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_run_directory_workdir_and_tmp_are_mounted_after_their_parents(runtime: str) -> None:
    job = spec({"runtime": runtime, "image": IMAGES[runtime], "mounts": ["/w/results:/w/results:ro", "/deep/a:/b"]})
    mounts = [str(mount) for mount in job.container.binds(job.run_dir, job.workdir)]
    assert mounts == ["/deep/a:/b", "/tmp:/tmp", "/w:/w", "/w/results:/w/results:ro", "/w/results/t:/w/results/t"]
    twice = ["/local:/tmp", "/local:/tmp:rw"]
    elsewhere = spec({"runtime": runtime, "image": IMAGES[runtime], "workdir": "/app", "mounts": twice})
    mounts = [str(mount) for mount in elsewhere.container.binds(elsewhere.run_dir, elsewhere.workdir)]
    assert mounts == ["/local:/tmp", "/w/results/t:/w/results/t"]


@pytest.mark.parametrize(
    ("keys", "asks"),
    [
        ({}, False),
        ({"gres": "gpu:8"}, True),
        ({"gres": "shard:2"}, True),
        ({"gres": "mps:50"}, True),
        ({"gres": "license:1,mps:a100:50"}, True),
        ({"gpus": 2}, True),
        ({"gpus_per_node": "h100:4"}, True),
        ({"sbatch": {"gpus-per-task": "1"}}, True),
        ({"gres": "license:1"}, False),
    ],
)
def test_gpus_are_given_to_the_container_when_the_job_asks_for_some(keys: dict[str, Any], asks: bool) -> None:
    podman = words(spec({"runtime": "podman", "image": "ray"}, **keys))
    assert ("--device=nvidia.com/gpu=all" in podman) == asks
    assert ("--nv" in words(spec({"runtime": "apptainer", "image": "/ray.sif"}, **keys))) == asks


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_environment_is_passed_by_name_and_arguments_hold_no_values(runtime: str) -> None:
    arguments = words(spec({"runtime": runtime, "image": IMAGES[runtime]}, env={"CANARY": "5up3r"}))
    assert not any("5up3r" in word for word in arguments)
    if runtime == "pyxis":
        assert value_of("--container-env", arguments) == ["CANARY,SK_A,RAY_B"]
    elif runtime == "podman":
        assert {"CANARY", "SLURM*", "SK_*", "RAY_*"} < set(value_of("--env", arguments))


def test_a_value_that_apptainer_would_change_is_refused() -> None:
    apptainer, podman = ({"runtime": runtime, "image": IMAGES[runtime]} for runtime in ("apptainer", "podman"))
    with pytest.raises(ValidationError, match=r"env\.A .* has a carriage return before a line break, which"):
        spec(apptainer, env={"A": "x\r\ny"})
    assert spec(apptainer, env={"A": "x\ry\n"}).env == {"A": "x\ry\n"}
    assert spec(podman, env={"A": "x\r\ny"}).env == {"A": "x\r\ny"}


def test_a_named_container_is_never_entered_while_another_job_runs_in_it() -> None:
    arguments = words(spec({"runtime": "pyxis", "image": "i", "name": "kept"}))
    assert value_of("--container-name", arguments) == ["kept:no_exec"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_python_with_a_folder_prepends_that_folder_to_the_image_path(runtime: str) -> None:
    container = {"runtime": runtime, "image": IMAGES[runtime]}
    assert "export PATH=" not in render(spec(container))
    script = render(spec(container, python="/opt/venv/bin/python"))
    assert script.index("sk_node_main() {") < script.index('export PATH=/opt/venv/bin:"$PATH"')


@pytest.mark.parametrize(
    "container",
    [
        {},
        {"runtime": "podman", "image": "ray", "mounts": ["/a", "/b:/c", "/d:/e:ro", "/f:/g:rw"], "check": ["image"]},
        {"runtime": "ours", "image": "anything"},
    ],
)
def test_a_spec_that_was_written_out_reads_back_as_the_same_spec(container: dict[str, Any]) -> None:
    job = spec(container)
    assert JobSpec.model_validate(job.model_dump()) == job
    assert JobSpec.model_validate(job.model_dump(mode="json")) == job
    assert JobSpec.model_validate(json.loads(json.dumps(job.model_dump(mode="json")))) == job


NO_IMAGE = {"runtime": "podman", "image": "i"}


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({"runtime": "Docker"}, "should match pattern"),
        ({"runtime": "../x"}, "should match pattern"),
        ({"image": "/a.sqsh"}, "image need a container: give runtime"),
        ({"mounts": ["/a"], "name": "x"}, "mounts and name need a container"),
        ({"runtime": "pyxis"}, "image is missing: container.runtime pyxis needs one"),
        ({"runtime": "podman", "image": ""}, "is empty"),
        ({"runtime": "podman", "image": "a\nb"}, "line break"),
        ({"runtime": "podman", "image": "a b"}, "neither an absolute path nor an image's name"),
        ({"runtime": "podman", "image": "-v"}, "neither an absolute path nor an image's name"),
        ({"runtime": "podman", "image": "./root"}, "neither an absolute path nor an image's name"),
        ({"runtime": "podman", "image": "~/root"}, "neither an absolute path nor an image's name"),
        ({"runtime": "podman", "image": "/a:b"}, "cannot carry the colon"),
        ({"runtime": "podman", "image": "nvcr.io#nvidia/a:1"}, "the # is pyxis's; write nvcr.io/nvidia/a:1"),
        ({"runtime": "apptainer", "image": "nvcr.io/a:1"}, "write docker://nvcr.io/a:1, or ./nvcr.io/a:1 for a file"),
        ({"runtime": "apptainer", "image": "docker://nvcr.io#a"}, "write docker://nvcr.io/a"),
        ({"runtime": "pyxis", "image": "nvcr.io/nvidia/a:1"}, "on Docker Hub; write nvcr.io#nvidia/a:1"),
        ({"runtime": "pyxis", "image": "docker://localhost:5000/a"}, "write localhost:5000#a"),
        ({"runtime": "pyxis", "image": "images/a.sqsh"}, "pyxis takes a file by its path: ./images/a.sqsh"),
        ({"runtime": "apptainer", "image": "/a.sif", "name": "x"}, "apptainer cannot start a kept container"),
        ({**NO_IMAGE, "name": "x"}, "podman cannot start a kept container"),
        ({**NO_IMAGE, "workdir": "relative"}, "not an absolute path"),
        ({**NO_IMAGE, "mounts": "/a"}, "valid tuple"),
        ({**NO_IMAGE, "mounts": [{"src": "/a"}]}, "is not a mount: write src:dst"),
        ({**NO_IMAGE, "mounts": ["a"]}, "'a' is not a mount: 'a' is not an absolute path"),
        ({**NO_IMAGE, "mounts": ["/a:b"]}, "'b' is not an absolute path"),
        ({**NO_IMAGE, "mounts": ["/a:/b:rx"]}, "is not a mount"),
        ({**NO_IMAGE, "mounts": ["/a:/b:ro:x"]}, "no path can hold a colon"),
        ({**NO_IMAGE, "mounts": ["/a:"]}, "'' is not an absolute path"),
        ({**NO_IMAGE, "mounts": [""]}, "is not an absolute path"),
        ({**NO_IMAGE, "mounts": ["/a:/b/.."]}, "over the whole image"),
        ({**NO_IMAGE, "mounts": ["/"]}, "over the whole image"),
        ({**NO_IMAGE, "mounts": ["/a\n/b"]}, "one printable line"),
        ({**NO_IMAGE, "mounts": ["/a:/x", "/b:/x/"]}, "two of them at /x"),
        ({**NO_IMAGE, "mounts": ["/a:/w/results/t"]}, "would hide the run directory"),
        ({**NO_IMAGE, "mounts": ["/w/results/t:/w/results/t:ro"]}, "would hide the run directory"),
        ({**NO_IMAGE, "check": ["images"]}, "'image', 'mounts' or 'runtime'"),
        ({**NO_IMAGE, "volumes": ["/a"]}, "Extra inputs"),
        ({"runtime": "pyxis", "image": "i", "mounts": ["/a b"]}, "holds ' ', which pyxis cannot carry in a mount"),
        ({"runtime": "pyxis", "image": "i", "mounts": ["/a,b"]}, "holds ',', which pyxis cannot carry"),
        ({"runtime": "pyxis", "image": "i", "mounts": ["/a$(id)"]}, "holds '$', which pyxis cannot carry"),
        ({"runtime": "apptainer", "image": "/a.sif", "mounts": ["/a,b"]}, "holds ',', which apptainer cannot carry"),
    ],
)
def test_what_a_runtime_cannot_take_is_refused_with_what_would_be_right(
    container: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(container)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_run_directory_that_a_runtime_cannot_mount_is_refused(runtime: str) -> None:
    with pytest.raises(ValidationError, match="holds ':', which"):
        spec({"runtime": runtime, "image": IMAGES[runtime]}, run_dir="/w/a:b")
    with pytest.raises(ValidationError, match="'/my work' holds ' ', which pyxis cannot"):
        spec({"runtime": "pyxis", "image": "i"}, workdir="/my work")


def test_image_and_mounts_expand_home_variables_and_the_file_folder() -> None:
    environ = {"HOME": "/home/me", "SCRATCH": "/scratch"}
    section = {"image": "${SCRATCH}/a.sqsh", "mounts": ["~/data:/data:ro", "$SCRATCH", "./x:/x", 7], "writable": True}
    assert expand_places(section, environ, "/project") == {
        "image": "/scratch/a.sqsh",
        "mounts": ["/home/me/data:/data:ro", "/scratch", "/project/x:/x", 7],
        "writable": True,
    }
    for text in ("nvcr.io#a:1", "/a~b", "costs $5", "~other/x"):
        assert expand(text, environ, "/project") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$SCRATCHH/x", "the variable SCRATCHH is not set"),
        ("/a/${B}", "the variable B is not set"),
        ("~/x", "the variable HOME is not set"),
        ("$P", "the value of P holds a colon"),
    ],
)
def test_a_variable_that_is_not_set_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(text, {"P": "/a:/b"}, "/")


def test_what_is_not_there_is_found_on_the_submitting_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.sif").touch()
    job = spec({"runtime": "apptainer", "image": "/none.sif", "mounts": ["/none:/x:ro", str(tmp_path)]})
    hint = "if compute nodes have it, take runtime out of container.check"
    assert missing_parts(job) == [
        ("container.image", "/none.sif: no such file"),
        ("container.mounts", "/none:/x:ro: /none: no such file or folder"),
        ("container.runtime", f"apptainer: not on PATH on this host; {hint}"),
    ]
    (tmp_path / "apptainer").touch(mode=0o755)
    assert missing_parts(spec({"runtime": "apptainer", "image": str(tmp_path / "a.sif")})) == []
    assert missing_parts(spec({"runtime": "podman", "image": "/none", "mounts": ["/none"], "check": []})) == []
    assert missing_parts(spec({})) == []
    assert missing_parts(spec({"runtime": "podman", "image": "oci-archive:/none", "check": ["image"]})) == [
        ("container.image", "/none: no such file")
    ]
    [(key, message)] = missing_parts(spec({"runtime": "podman", "image": str(tmp_path / "a.sif"), "check": ["image"]}))
    assert key == "container.image"
    assert "podman takes a folder with a root file system; write docker-archive:" in message


def test_a_runtime_of_a_site_s_own_is_a_template_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "container").mkdir()
    (tmp_path / "container/ours.sh.j2").write_text("sk_container=(ours {{ spec.container.image }})\n")
    job = spec({"runtime": "ours", "image": "an image's".replace(" ", "-")})
    assert "sk_container=(ours 'an-image'\"'\"'s')" in render(job, (tmp_path,))
