"""A job whose script bash cannot parse is refused before it waits in a queue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slurmkit.errors import Failure, UserError
from slurmkit.job import syntax
from slurmkit.job.settle import Request, settle
from slurmkit.job.syntax import checked_script
from tests.support.requirements import SLURMKIT


def refusal(folder: Path, text: str) -> str:
    (folder / "slurmkit.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        settle(Request(command=("true",)), folder, {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('setup: ["date", "if true"]', "setup: bash cannot parse its end ({}:1): syntax error: unexpected end of file"),
        ('setup: ["date", "f("]', "setup: bash cannot parse line 'f(' ({}:1): syntax error"),
        ('setup: ["date", "a b)", "c"]', "setup: bash cannot parse line 'a b)' ({}:1): syntax error near unexpected"),
        ('epilogue: ["echo \'open"]', 'epilogue: bash cannot parse line "echo \'open" ({}:1): unexpected EOF'),
        ('nodes: 1\nepilogue: ["("]', "epilogue: bash cannot parse its end ({}:2): syntax error"),
        ('setup: ["}", "{ true"]', "setup: bash cannot parse line '}}' ({}:1): syntax error near unexpected"),
        ('setup: ["cat <<EOF"]', "setup: bash cannot parse line 'cat <<EOF' ({}:1): warning: here-document"),
    ],
)
def test_lines_that_bash_cannot_parse_are_named(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text).startswith(message.format(tmp_path / "slurmkit.yaml"))


def test_the_site_s_prologue_is_named_with_its_file(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text('defaults: {time: 60}\nadd:\n  prologue: ["date", "done"]\n')
    with pytest.raises(UserError, match=r"prologue: bash cannot parse line 'done' .*site\.yaml:3"):
        settle(Request(command=("true",)), tmp_path, {"SLURMKIT_SITE": str(site)})


def test_a_template_that_bash_cannot_parse_is_named_with_its_block(tmp_path: Path) -> None:
    template = tmp_path / "job.sbatch.j2"
    template.write_text(
        '{% extends "slurmkit/job.sbatch.j2" %}\n{% block epilogue %}\nif true; fi\n{{ super() }}{% endblock %}\n'
    )
    spec = settle(Request(command=("true",)), tmp_path, {}).spec
    with pytest.raises(UserError) as caught:
        checked_script(spec, (tmp_path,))
    assert f"{template}, block epilogue: bash cannot parse line " in str(caught.value)
    assert "syntax error near unexpected token `fi'" in str(caught.value)


@pytest.mark.parametrize("command", ["render", "render --out x.sbatch", "submit --dry-run", "config", "run"])
def test_every_command_refuses_what_bash_cannot_parse(command: str, here: Path) -> None:
    done = subprocess.run(
        [SLURMKIT, *command.split(), "--set", 'setup=["if true"]', "--", "true"],
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "setup: bash cannot parse its end (command line: setup)" in done.stderr
    assert not [*here.iterdir()]


def test_a_bash_that_never_answers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "bash"
    slow.write_text("#!/bin/sh\nexec sleep 20\n")
    slow.chmod(0o755)
    monkeypatch.setattr(syntax, "_BASH", str(slow))
    monkeypatch.setattr(syntax, "_DEADLINE", 0.2, raising=False)
    with pytest.raises(Failure, match=r"bash -n did not parse the job's script within 0.2 s"):
        syntax.fault_in("true")
