"""Every command of README and documentation: read by the real command line, and really run where that is harmless."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from slurmkit.cli.config import command as config_command
from slurmkit.cli.main import cli
from slurmkit.cli.options import JobCommand, request_from
from slurmkit.errors import UserError
from slurmkit.grpo.__main__ import main as train
from slurmkit.job.render import render
from slurmkit.job.settle import Request, settle
from tests.support.documentation import TEXTS, is_ours, shell_blocks, spans
from tests.support.requirements import REPOSITORY, SLURMKIT
from tests.support.run_directories import Made

# What stands in for the names in commands. Runs that they name are there: RUN, NAME, A, B, C, small, math and one more.
STAND_INS = [
    ("templates show NAME", "templates show job.sbatch.j2"),
    ("templates diff [NAME]", "templates diff job.sbatch.j2"),
    ("--config …", "--config train.yaml"),
    ("key=value …", "grpo.seed=1"),
    ("…", "--config train.yaml"),
    ("RUN_DIRECTORY", "results/RUN"),
    ("JOBID", "4711"),
    ("--timeout S", "--timeout 60"),
    ("FILES…", "jobs/x.sbatch"),
    ("RUN…", "RUN"),
    ("FILE", "train.yaml"),
    ("/data", "data"),
]
# Programs that are not ours, whose words nobody here can check.
OTHERS = {"pytest", "ruff", "mypy", "mkdocs", "pip", "python", "python3.11", "apt-get", "git", "srun", "jq", "curl"}
OTHERS |= {"printf", "eval", "export", "."}
# What changes nothing but the folder that it is called in, asks no Slurm where there is none, and ends at once.
HARMLESS = {"render", "config", "check", "site.lint", "templates.list", "templates.show", "templates.diff"}
HARMLESS |= {
    "ls",
    "status",
    "top",
    "watch",
    "wait",
    "cancel",
    "report",
    "usage",
    "logs",
    "completion",
    "data.workplace",
}
# Where data lie that a page tells to download or to make first.
MADE = ("data/workplace", "results/workplace-tiny")
RUNS = ("RUN", "NAME", "A", "B", "C", "small", "grpo_workplace_assistant", "math", "x")
RUNS += tuple(f"smollm2-seed{seed}" for seed in (1, 2, 3))
OPTIONS_OF_A_JOB = {param.name for param in config_command.params} - {"as_json", "words"}
# Pages that show a piece of a rendered file, which nobody types, and the image that it is of.
RENDERED = {
    "docs/containers/none.md": "",
    "docs/containers/pyxis.md": "nvcr.io#nvidia/pytorch:25.01",
    "docs/containers/apptainer.md": "/images/ray.sif",
    "docs/containers/podman.md": "docker.io/rayproject/ray:2.60",
}
SHELL_PAGES = [page for page in TEXTS if any(shell_blocks(page))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with runs that are over and the files that the documentation speaks of, and no Slurm."""
    (tmp_path / "bin").mkdir()
    for program in ("bash", "git"):
        os.symlink(str(shutil.which(program)), tmp_path / "bin" / program)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{tmp_path / 'bin'}")
    os.symlink(REPOSITORY / "examples", tmp_path / "examples")
    os.symlink(REPOSITORY / "scripts", tmp_path / "scripts")
    os.symlink(REPOSITORY / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(REPOSITORY / "examples/grpo_arithmetic.yaml", tmp_path / "train.yaml")
    (tmp_path / "job.yaml").write_text("config: train.yaml\nnodes: 2\n")
    site = re.search(r"## The site's file\n+```yaml\n(.*?)```", TEXTS["docs/administrators.md"], re.DOTALL)
    assert site is not None
    (tmp_path / "site.yaml").write_text(site[1])
    for folder in ("jobs", "FOLDER", "templates"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(RUNS):
        first, last = f"{4704 + number}.0", f"{4704 + number}.1"
        run = Made(tmp_path / "results" / name).record(first[:-2])
        run.start(first, 300).end(first, 200, 75).start(last, 100).end(last, 50, 0, "the command is done")
        for attempt in (first, last):
            run.put(attempt, "driver.log", "a line\n").put(attempt, "node-node3.log", "another\n")
        run.steps({"train:reward_mean": 0.5})
        os.symlink(last, run.path / "attempts/latest")
    (tmp_path / "results/NAME/step_50").mkdir()
    (tmp_path / "results/NAME/step_50/manifest.json").write_text("{}")
    rows = [f"{folder}/{name}.jsonl" for folder in MADE for name in ("train", "validation", "val")]
    for file in map(tmp_path.joinpath, [*rows, "data/dapo-math-17k.parquet", "data/aime-2024.parquet"]):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURMKIT_")]:
        monkeypatch.delenv(name)
    return tmp_path


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of some lines of shell, comments and redirections left out, names stood in for."""
    for name, stand_in in STAND_INS:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", stand_in, text)
    text = re.sub(r"(?<= )\[([^\]=']+)\]", r"\1", text.replace("\\\n", " "))
    for line in text.splitlines():
        yield from (shlex.split(inner) for inner in re.findall(r"\$\(((?:slurmkit|scripts/)[^()]*)\)", line))
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "||", "|"):
                if words:
                    yield words
                words = []
            elif words and words[-1] == ">":
                words.pop()
            else:
                words.append(word)


def check(words: list[str], here: Path, is_whole: bool = True) -> str:
    """Fail where a command is not one that its program takes. Returns its name, with a dot before a subcommand's."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return ""
    program = words[1] if words[0] == "sudo" and len(words) > 1 else words[0]
    if program == "python" and words[-1].startswith("benchmarks/"):
        program = words[-1]
    if program == "slurmkit":
        return check_ours(words[1:], here, is_whole)
    if words[:2] == ["python", "-m"] and words[2].startswith("slurmkit"):
        assert importlib.util.find_spec(words[2]), f"there is no module {words[2]}"
        return words[2]
    if re.match(r"(\./)?(scripts|benchmarks)/", program):
        assert os.access(here / program, os.X_OK) or program.startswith("benchmarks/"), program
        assert (here / program).exists(), program
        if program == "scripts/devcluster":
            path = {**os.environ, "PATH": os.defpath}
            usage = subprocess.run(
                [here / program, "--help"], capture_output=True, text=True, check=True, env=path
            ).stdout
            for word in (words[1:2] if is_whole else []) + [word for word in words[2:] if word.startswith("--")]:
                assert re.search(rf"(?<!\w){re.escape(word)}\b", usage), f"devcluster knows no {word}"
        return program
    assert program in OTHERS or program.endswith("/pip"), f"nobody reads or runs {words}"
    if program == "pytest":
        paths = [word for last, word in pairwise(words) if not word.startswith("-") and last != "-m"]
        assert all((REPOSITORY / path).exists() for path in paths)
    return program


def check_all(text: str, here: Path, is_whole: bool = True) -> None:
    for words in commands(text):
        check(words, here, is_whole)


def check_ours(words: list[str], here: Path, is_whole: bool) -> str:
    command: click.Command = cli
    names: list[str] = []
    context = click.Context(cli, info_name="slurmkit")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found is not None, f"there is no command {words[0]}"
        names.append(words[0])
        command, words = found, words[1:]
    if isinstance(command, click.Group):
        assert words in ([], ["--help"], ["--version"]), words
        return ".".join(names)
    try:
        context = command.make_context(names[-1], list(words), parent=context)
    except (click.MissingParameter, click.BadOptionUsage):
        if is_whole:
            raise
        return ".".join(names)  # a sentence may speak of a command without its run, and of an option without its value
    if isinstance(command, JobCommand):
        given = {name: context.params.get(name) for name in OPTIONS_OF_A_JOB}
        request = request_from(context, context.params["words"], given)._replace(partial=names[-1] != "submit")
        if request.run_file is None or request.run_file.suffix != ".sbatch":
            settled = settle(request._replace(partial=request.partial or not is_whole), here)
            assert render(settled.spec, settled.templates).startswith("#!/bin/bash")
    return ".".join(names)


@pytest.mark.parametrize("page", SHELL_PAGES)
def test_every_command_to_type_is_one_that_its_program_takes(
    page: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in shell_blocks(page):
        in_bash = block.text.replace("[", "").replace("]", "") if "slurmkit" in block.text else block.text
        done = subprocess.run(["bash", "-n"], input=in_bash, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if page in RENDERED:
            continue
        for words in commands(block.text):
            if words[0] == "export":
                for word in words[1:]:
                    monkeypatch.setenv(*word.split("=", 1))
            name = check(list(words), here)
            if name in HARMLESS:
                run(words[words.index("slurmkit") + 1 :])


@pytest.mark.parametrize("page", RENDERED)
def test_the_rendered_excerpt_on_a_page_matches_the_renderer(page: str, here: Path) -> None:
    runtime = Path(page).stem
    flags = {"workdir": "/work", "run_dir": "/work/results/x", "env.OMP_NUM_THREADS": 8, "gres": "gpu:1"}
    container = {"runtime": runtime, "image": RENDERED[page], "mounts": ["/datasets:/data:ro"]}
    flags["container"] = {"runtime": "none"} if runtime == "none" else container
    settled = settle(Request(command=("true",), flags=flags), here)
    (block,) = shell_blocks(page)
    assert block.text in render(settled.spec, settled.templates)


def run(words: list[str]) -> None:
    """Run it for real: in this process, unless it writes to its own terminal or becomes another program."""
    words = ["top", "--once"] if words[0] == "top" else words
    if words[0] in ("logs", "watch", "data", "export"):
        done = subprocess.run([SLURMKIT, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"slurmkit {shlex.join(words)}: {done.stderr}"
        return
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, f"slurmkit {shlex.join(words)}: {result.output}"


@pytest.mark.parametrize("page", [page for page in TEXTS if any(map(is_ours, spans(page)))])
def test_every_command_inside_of_a_sentence_is_one_that_its_program_takes(page: str, here: Path) -> None:
    for span in filter(is_ours, spans(page)):
        check_all(span, here, is_whole=False)


def test_the_trainer_alone_takes_the_words_that_the_readme_shows(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    span = next(span for span in spans("README.md") if span.startswith("python -m slurmkit.grpo "))
    (words,) = commands(span)
    assert train([*words[3:], "grpo.seed=none"]) == 2, "it stops at the last word, having understood the others"
    assert "grpo.seed" in capsys.readouterr().err


def test_the_readme_s_project_file_is_a_job_s(here: Path) -> None:
    written = re.search(r"```yaml\n(# slurmkit.yaml\n.*?)```", TEXTS["README.md"], re.DOTALL)
    assert written is not None
    (here / "slurmkit.yaml").write_text(written[1])
    check_ours(["submit", "--nodes", "2", "--config", "train.yaml"], here, True)


MISTAKES = ["frobnicate --now", "scripts/frobnicate", "slurmkit frobnicate", "slurmkit run --frobnicate"]
MISTAKES += ["slurmkit submit", "slurmkit render --config train.yaml grpo.frobnicate=1", "slurmkit logs"]
MISTAKES += ["true && slurmkit status frobnicate", "slurmkit templates frobnicate", "python -m slurmkit.frobnicate"]


@pytest.mark.parametrize("text", MISTAKES)
def test_a_command_that_nobody_takes_is_noticed(text: str, here: Path) -> None:
    with pytest.raises((AssertionError, click.ClickException, UserError)):
        check_all(text, here)
