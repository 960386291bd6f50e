"""`slurmkit check`: what changed since a file was rendered is named, and shown as a difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slurmkit import __version__
from slurmkit.job import audit, check, render
from tests.support.git_project import commit, make_project, slurmkit


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "a project")


@pytest.fixture
def rendered(project: Path) -> Path:
    """A project with a template of its own and one rendered file."""
    (project / "templates").mkdir()
    template = '{% extends "slurmkit/job.sbatch.j2" %}\n{% block modules %}\n{{ super() }}{% endblock %}\n'
    (project / "templates/job.sbatch.j2").write_text(template)
    (project / "slurmkit.yaml").write_text((project / "slurmkit.yaml").read_text() + "templates: templates\n")
    assert slurmkit(project, "render", "--out", "jobs/x.sbatch").code == 0
    return project


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_an_untouched_file_is_the_same_here_and_in_another_checkout(rendered: Path, tmp_path: Path) -> None:
    assert slurmkit(rendered, "check", "jobs/x.sbatch").out == "same     jobs/x.sbatch\n"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(rendered, elsewhere)
    done = slurmkit(elsewhere / "templates", "check", "../jobs/x.sbatch")
    assert (done.code, done.out, done.err) == (0, "same     ../jobs/x.sbatch\n", "")


def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (render, audit, check):
        monkeypatch.setattr(module, "__version__", "9.9.9")


CHANGES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], list[str], list[str]]] = {
    "the file": (
        lambda project, _: edit(project / "jobs/x.sbatch", "--nodes=2", "--nodes=3"),
        ["jobs/x.sbatch was edited since it was rendered"],
        ["-#SBATCH --nodes=3", "+#SBATCH --nodes=2"],
    ),
    "the file's end": (
        lambda project, _: (project / "jobs/x.sbatch").write_text((project / "jobs/x.sbatch").read_text()[:-1]),
        ["jobs/x.sbatch was edited since it was rendered"],
        ["\\ No newline at end of file"],
    ),
    "the record": (
        lambda project, _: edit(project / "jobs/x.json", '"nodes": 2', '"nodes": 3'),
        ["the spec in jobs/x.json is not the one that it was rendered from"],
        ["-#SBATCH --nodes=2", "+#SBATCH --nodes=3"],
    ),
    "a template": (
        lambda project, _: edit(project / "templates/job.sbatch.j2", "{{ super() }}", "{{ super() }}# more\n"),
        ["the templates have changed since"],
        ["+# more"],
    ),
    "slurmkit": (
        lambda _, monkeypatch: newer(monkeypatch),
        [f"slurmkit {__version__} rendered it, this is 9.9.9"],
        [
            f"-# Rendered by slurmkit {__version__}. sbatch takes it as it is, once the folder of --output exists.",
            "+# Rendered by slurmkit 9.9.9. sbatch takes it as it is, once the folder of --output exists.",
        ],
    ),
    "a source": (
        lambda project, _: edit(project / "slurmkit.yaml", "nodes: 2", "nodes: 4"),
        ["slurmkit.yaml has changed since"],
        [],
    ),
    "a source away": (
        lambda project, _: (project / "slurmkit.yaml").unlink(),
        ["slurmkit.yaml is not there any more"],
        [],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_since_is_named_shown_and_how_to_render_again(
    what: str, rendered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, problems, diff = CHANGES[what]
    change(rendered, monkeypatch)
    done = slurmkit(rendered, "check")
    lines = done.out.splitlines()
    assert (done.code, done.err) == (1, "")
    assert lines[0] == "differs  jobs/x.sbatch"
    assert lines[1 : 1 + len(problems)] == [f"         {problem}" for problem in problems]
    assert lines[-1] == "         render it again: SLURMKIT_SITE='' slurmkit render --out jobs/x.sbatch"
    rest = lines[1 + len(problems) : -1]
    assert set(diff) <= set(rest)
    assert bool(rest) == bool(diff)


def test_a_source_outside_the_repository_that_is_not_here_is_a_notice(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("defaults: {time: 30}\n")
    slurmkit(project, "render", "--out", "jobs/x.sbatch", SLURMKIT_SITE=str(site))
    for change, notice in (
        (lambda: site.write_text("defaults: {time: 31}\n"), "has changed since"),
        (site.unlink, "is not there any more"),
    ):
        change()
        done = slurmkit(project, "check")
        assert done.code == 0
        notice = f"         notice: {site} {notice}, outside this repository"
        assert done.out.splitlines() == ["same     jobs/x.sbatch", notice]


def broken(project: Path, text: str) -> None:
    (project / "jobs/x.json").write_text(text)


def without(project: Path, key: str) -> None:
    record = json.loads((project / "jobs/x.json").read_text())
    del record[key]
    broken(project, json.dumps(record))


TROUBLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda project: (project / "jobs/x.json").unlink(), "has no x.json beside it"),
    "half a record": (
        lambda project: broken(project, '{"spec": '),
        "jobs/x.json: is not the record of a rendered file",
    ),
    "a list": (lambda project: broken(project, "[]"), "jobs/x.json: is not the record of a rendered file"),
    "not even text": (
        lambda project: (project / "jobs/x.json").write_bytes(b"\xff\xfe"),
        "jobs/x.json: is not the record of a rendered file",
    ),
    "a key gone": (lambda project: without(project, "sources"), "sources is missing"),
    "another's": (
        lambda project: edit(project / "jobs/x.json", '"file": "x.sbatch"', '"file": "y.sbatch"'),
        "jobs/x.json is the record of y.sbatch, not of x.sbatch",
    ),
    "a spec of the future": (
        lambda project: edit(project / "jobs/x.json", '"nodes": 2', '"noodles": 2'),
        f"slurmkit {__version__} wrote it, and {__version__} cannot read its spec: unknown key noodles",
    ),
    "no header": (
        lambda project: edit(project / "jobs/x.sbatch", "# Rendered by", "# Written by"),
        "does not begin as a file that slurmkit rendered",
    ),
    "a broken template": (
        lambda project: (project / "templates/job.sbatch.j2").write_text("{% if %}"),
        "templates/job.sbatch.j2:1: the template cannot be rendered",
    ),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_check_reports_an_uncheckable_file_and_still_checks_the_others(what: str, rendered: Path) -> None:
    slurmkit(rendered, "render", "--set", "templates=null", "--out", "jobs/y.sbatch")
    change, message = TROUBLE[what]
    change(rendered)
    done = slurmkit(rendered, "check", "jobs/x.sbatch", "jobs/y.sbatch")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert message in done.err
    assert done.out == "error    jobs/x.sbatch\nsame     jobs/y.sbatch\n"


def test_without_files_all_that_was_rendered_is_found_and_nothing_else(rendered: Path) -> None:
    for folder in ("jobs/deep er", "results/run", ".hidden"):
        (rendered / folder).mkdir(parents=True)
        for name in ("x.sbatch", "x.json"):
            shutil.copy(rendered / "jobs" / name, rendered / folder / name)
    (rendered / "results/run/run.json").write_text("{}")
    (rendered / "jobs/own.sbatch").write_text("#!/bin/bash\nsrun hostname\n")
    shutil.copy(rendered / "jobs/x.sbatch", rendered / "jobs/lost.sbatch")
    done = slurmkit(rendered, "check")
    found = [
        line.split(maxsplit=1)[1] for line in done.out.splitlines() if line.startswith(("same", "differs", "error"))
    ]
    assert found == ["jobs/lost.sbatch", "jobs/x.sbatch", "jobs/deep er/x.sbatch"]
    assert "jobs/deep er/x.sbatch" in slurmkit(rendered, "check", "jobs/deep er").out
    assert "jobs/lost.sbatch has no lost.json beside it" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "nothing to check: there is no rendered *.sbatch below this folder"),
        (["check", "none.sbatch"], "none.sbatch: cannot be read: No such file or directory"),
        (["check", "."], "nothing to check: there is no rendered *.sbatch below this folder"),
        (["render", "--out", "x.sh", "--", "true"], "--out x.sh: must end in .sbatch"),
        (
            ["render", "--out", "/proc/no/x.sbatch", "--", "true"],
            "no/x.sbatch cannot be written: No such file or directory",
        ),
    ],
)
def test_a_mistake_gets_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = slurmkit(tmp_path, *arguments)
    assert done.code == (1 if "cannot be written" in message else 2)
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_check_changes_nothing_not_even_git_s_index(rendered: Path) -> None:
    commit(rendered)
    before = {path: path.stat().st_mtime_ns for path in rendered.rglob("*") if path.is_file()}
    slurmkit(rendered, "check")
    assert {path: path.stat().st_mtime_ns for path in rendered.rglob("*") if path.is_file()} == before


def test_symbolic_links_to_folders_are_followed_once(rendered: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    shutil.move(rendered / "jobs/x.sbatch", tmp_path / "elsewhere/deep/x.sbatch")
    shutil.move(rendered / "jobs/x.json", tmp_path / "elsewhere/deep/x.json")
    (rendered / "jobs").rmdir()
    assert list(check.rendered_below(rendered)) == []
    (rendered / "a").symlink_to(tmp_path / "elsewhere")
    (rendered / "b").symlink_to(tmp_path / "elsewhere/deep")
    (rendered / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere/deep/back").symlink_to("..")
    assert list(check.rendered_below(rendered)) == [rendered / "a/deep/x.sbatch"]


def test_check_finds_a_file_in_a_symlinked_folder(rendered: Path, tmp_path: Path) -> None:
    here = tmp_path / "deep/here"
    here.mkdir(parents=True)
    (here / "link").symlink_to(rendered / "jobs")
    done = slurmkit(here, "check")
    assert (done.code, done.out, done.err) == (0, "same     link/x.sbatch\n", "")
