"""`slurmkit templates check`: an override that loses what makes a job safe is caught, with its file, block and spec."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slurmkit.job.lint import shellcheck
from slurmkit.job.render import render
from slurmkit.job.spec import JobSpec
from slurmkit.job.trace import render_traced
from tests.support.requirements import SLURMKIT

JOB = "job.sbatch.j2"


def blocks(**texts: str) -> dict[str, str]:
    inner = "".join(f"{{% block {name} %}}\n{text}\n{{% endblock %}}\n" for name, text in texts.items())
    return {JOB: f'{{% extends "slurmkit/{JOB}" %}}\n{inner}'}


# What a careless administrator may write, and what must be said of it: block, message, and spec or rehearsal.
BAD = {
    "five mistakes": blocks(
        directives="#SBATCH --job-name={{ spec.name | directive }}",
        environment="{{ super() }}\n#SBATCH --exclusive\nunused=1",
        preflight="env | sort\numask 022\n{{ super() }}",
        epilogue="echo done",
    ),
    "four others": blocks(
        environment='{{ super() }}\nset +e\neval "echo \\"$sk_run_dir\\""',
        modules="sk_setup_node() { :; }",
        launch='{{ super() | replace("TERM INT", "INT") | replace("signal.USR2", "other") }}',
    ),
    "a trace": blocks(command="{{ super() }}\nset -x"),
    "no quotes": blocks(command='{{ super() }}\nsk_command=({{ spec.command | join(" ") | raw }})'),
    "an open if": blocks(modules="{{ super() }}\nif true; then"),
    "a runtime": {"container/none.sh.j2": "# nothing\n"},
    "a value that not all jobs have": blocks(command="{{ super() }}\ntime={{ spec.time }}"),
}
SAID = [
    ("five mistakes", "directives", "the directives lose --output, which the job asks for", "one node"),
    ("five mistakes", "directives", "the directives lose --gpus-per-node, which", "GRES: gpus-per-node"),
    ("five mistakes", "environment", "sbatch ignores '#SBATCH --exclusive', which comes after the first", "one node"),
    ("five mistakes", "environment", "shellcheck: SC2034: unused appears unused", ""),
    ("five mistakes", "preflight", "the environment, secrets included, is written to slurm.out", "succeeds"),
    ("five mistakes", "preflight", "what the job writes can be read by everybody: umask", "succeeds"),
    ("five mistakes", "epilogue", "ends with exit code 0 and not 7", "fails with exit code 7"),
    ("four others", "environment", "set -euo pipefail does not hold from 'set +e' on", "succeeds"),
    ("four others", "environment", "a value ran as code", "succeeds"),
    ("four others", "launch", "leaves processes behind: bash, driver, raylet", "Slurm cancels the job"),
    ("four others", "launch", "has not ended after", "Slurm sends USR2"),
    ("four others", "modules", "ends with exit code 0 and not 75", "a line of setup fails"),
    ("a trace", "command", "the shell prints every value from 'set -x' on", "succeeds"),
    ("no quotes", "command", "bash -n: syntax error", "hostile values"),
    ("an open if", "modules", "bash -n: syntax error", ""),
    ("a runtime", "launch", "shellcheck: SC2154: sk_container is referenced but not assigned", ""),
    ("a value that not all jobs have", None, "the template cannot be rendered: a template puts out None", "one node"),
]
GOOD = {
    "nothing": {},
    "additions": {
        JOB: f'{{% extends "slurmkit/{JOB}" %}}\n'
        "{% block directives %}{{ super() }}#SBATCH --nice=5\n{% endblock %}\n"
        "{% block environment %}\n{{ super() }}\nexport NCCL_DEBUG=WARN\n{% endblock %}\n"
        "{% block modules %}\n{{ super() }}\ncommand -v nvidia-smi >/dev/null || true\n{% endblock %}\n"
        "{% block epilogue %}\ndate\n{{ super() }}\n{% endblock %}\n",
        "container/none.sh.j2": "sk_container=(nice -n 1)  # kinder to the others\n",
    },
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, int, str]]]:
    """Each override's folder, with the exit code and the output of check."""
    base = tmp_path_factory.mktemp("over rides")

    def one(item: tuple[str, dict[str, str]]) -> tuple[str, tuple[Path, int, str]]:
        name, files = item
        folder = base / name
        folder.mkdir()
        for path, text in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)
        done = subprocess.run(
            [SLURMKIT, "templates", "check", "--templates", folder],
            cwd=base, capture_output=True, text=True, timeout=200,
            env={**os.environ, "SLURMKIT_SITE": ""},
        )  # fmt: skip
        return name, (folder, done.returncode, done.stdout + done.stderr)

    with ThreadPoolExecutor(3) as pool:
        yield dict(pool.map(one, {**BAD, **GOOD}.items()))


@pytest.mark.parametrize(("name", "block", "what", "spec"), SAID)
def test_check_reports_an_unsafe_override_with_file_block_and_spec(
    name: str, block: str | None, what: str, spec: str, checked: dict[str, tuple[Path, int, str]]
) -> None:
    folder, code, output = checked[name]
    assert code == 1, output
    # Each problem begins with a path; what a job said is indented below.
    problems = output.replace("\n/", "\0/").split("\0")
    file = f"{folder}/{next(iter(BAD[name]))}"
    found = [part for part in problems if part.startswith(file) and what in part and spec in part]
    assert found, output
    if block is not None:
        # Where it is not known which of several overridden blocks it was, all are named.
        named = found[0].partition(", block ")[2].partition(":")[0].split(" or ")
        assert block in named, output


@pytest.mark.parametrize("name", GOOD)
def test_a_good_override_passes(name: str, checked: dict[str, tuple[Path, int, str]]) -> None:
    folder, code, output = checked[name]
    assert code == 0, output
    assert "no problems in " in output
    assert str(folder) in output


def test_a_missing_shellcheck_is_said_and_bash_still_reads_the_scripts(tmp_path: Path) -> None:
    for path, text in BAD["an open if"].items():
        (tmp_path / path).write_text(text)
    program = "import sys; from slurmkit.job import lint; lint.shellcheck = lambda: None; "
    program += "from slurmkit.cli.main import main; main()"
    done = subprocess.run(
        [SLURMKIT.with_name("python"), "-c", program, "templates", "check", "--templates", tmp_path],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "shellcheck is not on PATH, and did not run; bash -n did" in done.stderr
    assert "bash -n: syntax error" in done.stdout
    assert shellcheck() is not None


def test_traced_render_equals_render_and_maps_each_line_to_its_origin(tmp_path: Path) -> None:
    (tmp_path / JOB).write_text(blocks(environment="# mine\n{{ super() }}\n# mine too")[JOB])
    minimal = {"name": "t", "python": "/usr/bin/python3", "workdir": "/w", "run_dir": "/r", "command": ["true"]}
    spec = JobSpec.model_validate(minimal)
    traced = render_traced(spec, (tmp_path,))
    assert traced.script == render(spec, (tmp_path,))
    lines = traced.script.splitlines()
    assert traced.place(lines.index("# mine") + 1) == (f"{tmp_path}/{JOB}", "environment")
    assert traced.place(lines.index("# mine too") + 1) == (f"{tmp_path}/{JOB}", "environment")
    for text, file, inside in (
        ('export PATH=/usr/bin:"$PATH"', JOB, "environment"),
        ("set -euo pipefail", JOB, ""),
        ("sk_container=()  # straight on the node", "container/none.sh.j2", "launch"),
        ('exit "$sk_code"', JOB, "epilogue"),
    ):
        place = traced.place(lines.index(text) + 1)
        assert place[0].endswith(f"templates/{file}")
        assert place[1] == inside
