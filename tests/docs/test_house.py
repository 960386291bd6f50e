"""What a project of this kind has beside its code says the same as the code."""

from __future__ import annotations

import configparser
import re
import tomllib
from typing import Any

import yaml

from slurmkit import __version__
from tests.support.documentation import TEXTS
from tests.support.requirements import REPOSITORY


def read(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def test_the_workflow_runs_the_readme_s_two_commands_on_a_fresh_debian() -> None:
    commands = re.findall(r"^(\./scripts/\w+)", TEXTS["README.md"], re.MULTILINE)
    assert commands == ["./scripts/quickstart", "./scripts/test"]
    jobs = read(".github/workflows/test.yml")["jobs"]
    for name, command in zip(("quickstart", "test"), commands, strict=True):
        assert jobs[name]["steps"][-1]["run"].split()[0] == command
    for job in jobs.values():
        container = job["container"]
        assert (container if isinstance(container, str) else container["image"]) == "debian:12"


def test_the_workflow_has_a_job_for_each_lane_that_the_test_script_runs() -> None:
    (pattern,) = re.findall(r"^  (unit .*)\) set --", (REPOSITORY / "scripts/test").read_text(), re.MULTILINE)
    jobs = read(".github/workflows/test.yml")["jobs"]
    lanes = jobs["test"]["strategy"]["matrix"]["lane"]
    assert lanes == pattern.split(" | ")
    marks = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert [*lanes, "nightly"] == [mark.partition(":")[0] for mark in marks]
    assert jobs["lint"]["steps"][-1]["run"] == "./scripts/test lint"


def test_hooks_run_offline_and_cover_the_checks_of_the_test_script() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert all(hook["language"] == "system" for hook in repository["hooks"])
    entries = [hook["entry"] for hook in repository["hooks"]]
    checks = re.findall(
        r"^(ruff check|ruff format --check|mypy|shellcheck)\b", (REPOSITORY / "scripts/test").read_text(), re.M
    )
    assert len(checks) == 4
    assert set(checks) < set(entries)
    pattern = next(hook["files"] for hook in repository["hooks"] if hook["entry"] == "shellcheck")
    for script in ("scripts/quickstart", "scripts/devcluster", "scripts/devcluster.d/conf.sh", ".ci/run"):
        assert re.search(pattern, script), script


def test_licence_matches_the_package_and_the_changelog_has_its_version() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(REPOSITORY / "setup.cfg")
    licence = (REPOSITORY / "LICENSE").read_text()
    assert setup["metadata"]["license"] == "Apache-2.0"
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in licence
    for name in setup["metadata"]["license_files"].replace(",", " ").split():
        assert (REPOSITORY / name).is_file()
    assert __version__ in (REPOSITORY / "CHANGELOG.md").read_text()


def test_an_issue_s_form_asks_for_something() -> None:
    forms = sorted((REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.md"))
    assert [form.stem for form in forms] == ["bug", "feature"]
    for form in forms:
        _, head, body = form.read_text(encoding="utf-8").split("---\n", 2)
        assert yaml.safe_load(head).keys() >= {"name", "about", "labels"}
        assert body.count("**") >= 4
