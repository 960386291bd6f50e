"""A project in a real git repository, and slurmkit as its user calls it, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from slurmkit.cli.main import main
from slurmkit.job.render import digest_of_templates, environment_for

_ME = {f"GIT_{role}_{fact}": "me@example.org" for role in ("AUTHOR", "COMMITTER") for fact in ("NAME", "EMAIL")}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def slurmkit(here: Path, *arguments: str | Path, **environment: str) -> Done:
    """Call the command; what it remembers of templates within a process is forgotten before."""
    digest_of_templates.cache_clear()
    environment_for.cache_clear()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(here),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["slurmkit", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"SLURMKIT_SITE": "", **environment}),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, **_ME, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout


def commit(folder: Path) -> str:
    """Commit all that is there; the commit's name."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    return git(folder, "rev-parse", "HEAD").strip()


def make_project(folder: Path) -> Path:
    """A repository with a project whose job ends when there is a file `go` in it."""
    (folder / "jobs").mkdir(parents=True)
    (folder / "slurmkit.yaml").write_text(
        'name: x\nnodes: 2\nenv: {A: "1"}\ncommand: [bash, -c, "until [[ -e go ]]; do sleep 0.1; done"]\n'
    )
    (folder / ".gitignore").write_text("results/\n/go\n")
    git(folder, "init", "--quiet")
    commit(folder)
    return folder
