"""2,000 hostile values through every field that reaches a shell or sbatch: on a real Slurm each arrives byte for byte,
or is refused before submission."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmkit.config.section import ValidationError
from slurmkit.job.render import render
from slurmkit.job.spec import JobSpec
from tests.support.cluster import Cluster
from tests.support.requirements import HOSTILE

COUNT = 2000
_SHELL = "'\"`$\\;&|<>(){}[]*?!~#%@=:,+-. \t\n\r\x1b\x7f\0"
_WORDS = [
    *HOSTILE,
    "%j",
    "%%",
    "$(id)",
    "${HOME}",
    "\\n",
    "--nodes=4",
    "#SBATCH --nodes=4",
    "EOF",
    "\x1f",
    "hetjob",
    "é",
]
# Mostly characters with a meaning to a shell or to sbatch, some of any kind, and whole traps joined with either.
VALUE = st.lists(
    st.sampled_from(_WORDS) | st.text(_SHELL, max_size=6) | st.text(max_size=6), min_size=1, max_size=6
).map("".join)


def hostile_values() -> list[str]:
    values: list[str] = []

    @settings(max_examples=COUNT, derandomize=True, database=None, deadline=None)
    @given(VALUE)
    def collect(value: str) -> None:
        values.append(value)

    collect()
    return values


def spec(folder: Path, **keys: object) -> JobSpec:
    minimal = {"name": "t", "python": "python3", "workdir": str(folder), "run_dir": str(folder), "command": ["true"]}
    return JobSpec.model_validate({**minimal, **keys})


def is_accepted(folder: Path, key: str, value: object) -> bool:
    try:
        spec(folder, **{key: value})
    except ValidationError:
        return False
    return True


def submit_held(cluster: Cluster, path: Path) -> str:
    done = subprocess.run(
        ["sbatch", "--parsable", "--hold", path], env=cluster.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_name_comment_and_workdir_are_stored_exactly_or_refused_early(cluster: Cluster, shared_path: Path) -> None:
    def send(numbered: tuple[int, str]) -> tuple[str, dict[str, str]]:
        index, value = numbered
        wanted = {"name": value, "comment": value, "workdir": f"{shared_path}/{index}/{value}"}
        keys = {key: text for key, text in wanted.items() if is_accepted(shared_path, key, text)}
        path = shared_path / f"{index}.sbatch"
        path.write_text(render(spec(shared_path, **keys)), encoding="utf-8")
        return submit_held(cluster, path), keys

    with ThreadPoolExecutor(2) as pool:
        sent = dict(pool.map(send, enumerate(hostile_values())))
    try:
        rows = cluster.ask("squeue", "-h", "-o", "%i\x1f%j\x1f%Z\x1f%k\x1e").split("\x1e\n")
        stored = dict(row.split("\x1f", 1) for row in rows if row)
        for job_id, keys in sent.items():
            expected = keys.get("name", "t"), keys.get("workdir", str(shared_path)), keys.get("comment", "(null)")
            assert stored[job_id] == "\x1f".join(expected)
    finally:
        cluster.ask("scancel", "--state=PENDING", "--user=root")
    assert len(sent) >= COUNT
    for key in ("name", "comment", "workdir"):
        assert sum(key in keys for keys in sent.values()) > 20, f"nearly every {key} was refused"


def batches(values: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def test_env_and_command_reach_the_process_exactly_or_are_refused_early(cluster: Cluster, shared_path: Path) -> None:
    values = hostile_values()
    accepted = [value for value in values if is_accepted(shared_path, "command", ["x", value])]
    assert accepted == [value for value in values if "\0" not in value]
    assert all(is_accepted(shared_path, "env", {"A": value}) == (value in accepted) for value in values)
    show = """printf '%s\\0' "$@" >arguments
for ((i = 0; i < $#; i++)); do name=V$i; printf '%s\\0' "${!name}"; done >environment"""
    for index, batch in enumerate(batches(accepted, 1000)):
        folder = shared_path / str(index)
        folder.mkdir()
        job = spec(
            folder,
            env={f"V{number}": value for number, value in enumerate(batch)},
            command=["bash", "-c", show, "zero", *batch],
            python=cluster.stub_python,
        )
        path = folder / "job.sbatch"
        path.write_text(render(job), encoding="utf-8")
        done = subprocess.run(["sbatch", "--wait", path], env=cluster.environment, capture_output=True, timeout=200)
        output = "".join(log.read_text() for log in folder.glob("slurm-*.out"))
        assert done.returncode == 0, output
        expected = b"".join(value.encode() + b"\0" for value in batch)
        assert (folder / "arguments").read_bytes() == expected
        assert (folder / "environment").read_bytes() == expected


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer", "podman"])
def test_container_mounts_image_and_workdir_arrive_exactly_or_are_refused(tmp_path: Path, runtime: str) -> None:
    """The rendered lines that make the words of the runtime's command line, run by bash."""
    words, lines = [], ["set -euo pipefail"]
    for value in hostile_values():
        keys = {"image": f"/i/{value}", "workdir": f"/w/{value}", "mounts": [f"/s/{value}:/d/{value}"]}
        for key, part in keys.items():
            container = {"runtime": runtime, "image": "/i", "workdir": "/w", key: part}
            if not is_accepted(tmp_path, "container", container):
                continue
            script = render(spec(tmp_path, container=container))
            begin = script.index(f"# ---- {'Apptainer' if runtime == 'apptainer' else runtime}")
            lines += [script[begin : script.index('"${sk_step[@]}"')], "printf '%s\\0' \"${sk_container[@]}\" $'\\x1e'"]
            words.append((key, value))
    done = subprocess.run(["bash"], input="\n".join(lines).encode(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    rows = done.stdout.split(b"\x1e\0")
    assert len(rows) == len(words) + 1
    for (key, value), row in zip(words, rows, strict=False):
        wanted = f"/d/{value}" if key == "mounts" else f"/{key[0]}/{value}"
        assert os.path.normpath(wanted).encode() in row or wanted.encode() in row, (key, value, row)
    for key in ("image", "workdir", "mounts"):
        assert sum(key == one for one, _ in words) > 20, f"nearly every {key} was refused"
