"""A job's own variables never meet those of the script that runs it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.section import ValidationError
from slurmkit.errors import UserError
from slurmkit.job import rehearsal
from slurmkit.job.render import render
from slurmkit.job.reserved import reserved
from slurmkit.job.secrets import looks_secret
from slurmkit.job.settle import Request, settle
from slurmkit.job.spec import JobSpec
from slurmkit.job.trace import Traced, render_traced
from tests.support.requirements import REPOSITORY

MINIMAL = {"name": "t", "python": "/usr/bin/python3", "workdir": "/w", "run_dir": "/r", "command": ["true"]}
FULL: dict[str, Any] = {
    "secrets": {"HF_TOKEN": {"env": "HF_TOKEN"}},
    "setup": ["true"],
    "epilogue": ["date"],
    "until_done": {"enabled": True},
    "config": "grpo: {seed: 1}\n",
}
KEYS: dict[str, dict[str, Any]] = {
    "minimal": {},
    "full": FULL,
    **{
        runtime: {**FULL, "container": {"runtime": runtime, "image": "/i.sqsh", "mounts": ["/d:/d"]}}
        for runtime in ("pyxis", "apptainer", "podman")
    },
}
SCRIPTS = {
    **{name: render(JobSpec.model_validate({**MINIMAL, **keys})) for name, keys in KEYS.items()},
    "example": render(
        # Not this environment's Python, whose path may have a space and then looks like one more name.
        settle(
            Request(config=REPOSITORY / "examples/grpo_arithmetic.yaml", flags={"python": "python3"}), Path("/w"), {}
        ).spec
    ),
}
# The script keeps what the job gives: it sets these only if they are missing, or inside a container of no use.
ONCE_ASSIGNED = {
    *("command", "code", "driver", "gpus", "keep", "keeper", "keeper_pid", "name", "node_gpus", "node_ip", "pids"),
    *("raylet", "rank", "run_dir", "signal", "step", "total", "attempt", "config", "container", "step_code", "store"),
}
KEPT = {"PYTHONFAULTHANDLER", "TMPDIR", "HOME"}
NAME = r"[A-Za-z_][A-Za-z0-9_]*"
ASSIGNS = (
    rf"(?:^|[\s;({{&|!])({NAME})(?:\[[^]\s]*\])?\+?=",
    rf"\bfor \(*({NAME})\b",
    rf"\b(?:mapfile|printf -v|unset|declare -p)(?: -\w+(?: '')?)* ({NAME})\b",
    rf"\(\(({NAME}) ?[-+*/%<>=]",
)
SEVERAL = r"(?<![-\w])(?:local|export|read(?: -r)?(?: -d '')?)((?: [A-Za-z_]\w*(?:=\S*)?)+)"


def assigned(script: str) -> set[str]:
    """The names that a script assigns, as far as patterns see them."""
    code = "\n".join(line for line in script.splitlines() if not line.lstrip().startswith("#"))
    code = re.sub(r"\s# .*", "", code)
    code = re.sub(r"(?<!\S)--?[\w=-]+=|(?<= 78 )\".*?\"", "word ", code)
    code = re.sub(r"sk_config='.*?'\n", "sk_config=\n", code, flags=re.DOTALL)
    code = re.sub(r"python3 -c '.*?'", "python3", code, flags=re.DOTALL)
    found = {name for pattern in ASSIGNS for name in re.findall(pattern, code, re.MULTILINE)}
    for words in re.findall(SEVERAL, code):
        found |= {word.partition("=")[0] for word in words.split()}
    functions = set(re.findall(rf"^({NAME})\(\) {{", code, re.MULTILINE))
    return found | functions


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_job_can_set_a_name_that_its_script_assigns(name: str) -> None:
    names = assigned(SCRIPTS[name])
    assert {"sk_command", "sk_code", "sk_keeper_pid", "sk_rank", "sk_pids", "sk_finish", "RAY_ADDRESS"} < names
    assert {each for each in names if not reserved(each)} <= KEPT


def test_every_other_word_of_the_script_is_only_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rehearsed jobs end as ever, and the command receives every value, whatever the variables' names."""
    # Programs on the way read these, in contrast to the script.
    read = {"HOME", "TMPDIR", "HF_TOKEN", "HF_HOME", "V", "PYTHONFAULTHANDLER"}
    words = {word for script in SCRIPTS.values() for word in re.findall(NAME, script)} | ONCE_ASSIGNED
    words = {word for word in words - read if not reserved(word) and not looks_secret(word)}
    assert words > ONCE_ASSIGNED
    given = dict.fromkeys(words, "x=$(touch pwned)")

    def rendered(spec: JobSpec) -> Traced:
        show = 'env -0 >"$CHECK/environment"; exec "$@"'
        changed = {"env": {**given, **spec.env}, "command": ["bash", "-c", show, "x", *spec.command]}
        return render_traced(JobSpec.model_validate({**spec.model_dump(mode="json"), **changed}), ())

    received: list[dict[str, str]] = []

    def faults(act: Any, code: int | None, left: list[str], folder: Path, spec: JobSpec) -> Iterator[Any]:
        received.append(environment_in(folder / "environment"))
        yield from real_faults(act, code, left, folder, spec)

    real_faults = rehearsal._faults
    monkeypatch.setattr(rehearsal, "ACTS", rehearsal.ACTS[:3])
    monkeypatch.setattr(rehearsal, "_faults", faults)
    assert [*rehearsal.rehearse(rendered)] == []
    assert len(received) == 3
    for environment in received:
        assert {name: environment.get(name) for name in given} == given


def environment_in(path: Path) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in os.fsdecode(path.read_bytes()).rstrip("\0").split("\0"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "belongs to slurmkit") for name in ("sk_code", "SK_MARK", "Sk_x")),
        *((name, "belongs to Slurm") for name in ("SLURM_JOB_ID", "SBATCH_ACCOUNT", "SRUN_CONTAINER")),
        *((name, "belongs to bash") for name in ("UID", "PPID", "SHELLOPTS", "BASHOPTS", "BASH_ENV", "IFS", "_")),
        *((name, "is set by the job's script itself") for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "PYXIS_X")),
        ("PATH", "would replace the whole PATH: add to it with a line of setup"),
    ],
)
def test_a_reserved_name_is_refused_under_env_and_secrets(name: str, reason: str) -> None:
    for keys in ({"env": {name: "x"}}, {"secrets": {name: {"env": "X"}}}):
        with pytest.raises(ValidationError) as caught:
            JobSpec.model_validate({**MINIMAL, **keys})
        assert f"{name} {reason}" in str(caught.value)


def test_the_refusal_names_key_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "slurmkit.yaml").write_text("nodes: 1\nenv:\n  A: b\n  UID: 5\nsecrets:\n  X: env\n  IFS: env\n")
    with pytest.raises(UserError) as caught:
        settle(Request(command=("true",)), tmp_path, {})
    first, second = str(caught.value).splitlines()
    assert first.startswith("env.UID: cannot be set: UID belongs to bash")
    assert first.endswith(f"({tmp_path}/slurmkit.yaml:4)")
    assert second.startswith("secrets.IFS: cannot be a secret: IFS belongs to bash")
    assert second.endswith(f"({tmp_path}/slurmkit.yaml:7)")


@pytest.mark.parametrize(
    "name", ["http_proxy", "LD_PRELOAD", "LD_LIBRARY_PATH", "HOME", "command", "code", "ENV", "LC_ALL"]
)
def test_a_name_that_jobs_need_is_accepted(name: str) -> None:
    assert JobSpec.model_validate({**MINIMAL, "env": {name: "x"}}).env == {name: "x"}
