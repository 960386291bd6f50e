"""`slurmkit render --out`: the file, the record beside it, and either both or neither."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from slurmkit.errors import Failure
from slurmkit.run.directory import write_together
from tests.support.git_project import commit, git, make_project, slurmkit
from tests.support.requirements import REPOSITORY, SLURMKIT

EXAMPLE = REPOSITORY / "examples/grpo_arithmetic.yaml"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "a project")


def test_the_record_names_all_that_the_file_was_made_from(project: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("defaults: {time: 30}\nadd: {env: {SITE: here}}\ntemplates: templates\n")
    (tmp_path / "templates").mkdir()
    environment = {"SLURMKIT_SITE": str(site), "SLURMKIT_COMMENT": "it's mine"}
    (project / "train.yaml").write_text("defaults: base.yaml\ngrpo: {seed: 7}\n")
    (project / "base.yaml").write_text(EXAMPLE.read_text())
    (project / "job.yaml").write_text("config: train.yaml\n")
    head = commit(project)
    (project / "jobs/note").write_text("untracked, and no source")
    (project / "base.yaml").write_text((project / "base.yaml").read_text() + "\n")
    (project / "job.yaml").write_text("config: train.yaml\n")
    done = slurmkit(project, "render", "job.yaml", "--nodes", "3", "--out", "jobs/x.sbatch", **environment)
    assert (done.code, done.err) == (0, "wrote jobs/x.sbatch and jobs/x.json\n")
    script, record = (project / "jobs/x.sbatch").read_text(), json.loads((project / "jobs/x.json").read_text())
    assert record["sha256"] == digest(project / "jobs/x.sbatch")
    assert f"# spec      sha256:{record['spec_sha256']}\n" in script
    assert f"# templates sha256:{record['templates_sha256']}\n" in script
    assert record["sources"] == {
        str(site): digest(site),
        **{f"../{name}": digest(project / name) for name in ("slurmkit.yaml", "job.yaml", "base.yaml", "train.yaml")},
    }
    assert record["site"] == str(site)
    assert record["templates"] == [str(tmp_path / "templates")]
    assert record["environment"] == ["A", "SITE"]
    assert record["git"] == {"commit": head, "changed": {"base.yaml": "modified"}}
    if (REPOSITORY / ".git").exists():
        assert record["slurmkit_git"]["commit"] == git(REPOSITORY, "rev-parse", "HEAD").strip()
    assert record["spec"]["nodes"] == 3
    origins = record["origins"]
    assert (origins["nodes"], origins["time"]) == ("command line: nodes", f"{site}:1")
    assert (origins["env.A"], origins["comment"]) == ("../slurmkit.yaml:3", "environment: SLURMKIT_COMMENT")
    assert record["config_origins"]["grpo.seed"] == "../train.yaml:2"
    assert record["config_origins"]["logger.wandb.mode"].startswith("../base.yaml:")
    assert record["directory"] == ".."
    assert record["command"] == (
        f"SLURMKIT_COMMENT='it'\"'\"'s mine' SLURMKIT_SITE={site} "
        "slurmkit render job.yaml --nodes 3 --out jobs/x.sbatch"
    )


def test_the_recorded_command_reproduces_both_files_byte_for_byte(project: Path) -> None:
    assert slurmkit(project / "jobs", "render", "--set", "env.A=a b", "--out", "x.sbatch").code == 0
    paths = [project / "jobs/x.sbatch", project / "jobs/x.json"]
    before = [path.read_bytes() for path in paths]
    record = json.loads(before[1])
    for path in paths:
        path.write_text("")
    command = record["command"].replace("slurmkit ", f"{shlex.quote(str(SLURMKIT))} ", 1)
    place = (project / "jobs" / record["directory"]).resolve()
    environment = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "USER": "other", "HOSTNAME": "other"}
    subprocess.run(["bash", "-c", command], cwd=place, env=environment, check=True, timeout=60)
    assert [path.read_bytes() for path in paths] == before


def test_the_record_marks_untracked_and_ignored_sources_but_not_its_output(project: Path) -> None:
    (project / "results").mkdir()
    (project / "results/ignored.yaml").write_text("nodes: 4\n")
    (project / "new.yaml").write_text("name: x\n")
    for run_file, expected in (("new.yaml", "untracked"), ("results/ignored.yaml", "ignored")):
        slurmkit(project, "render", run_file, "--out", "jobs/x.sbatch")
        git(project, "add", "jobs")
        slurmkit(project, "render", run_file, "--out", "jobs/x.sbatch")
        assert json.loads((project / "jobs/x.json").read_text())["git"]["changed"] == {run_file: expected}


def test_outside_git_the_record_has_no_commit_and_keeps_relative_paths(tmp_path: Path) -> None:
    (tmp_path / "slurmkit.yaml").write_text("command: [true]\n".replace("true", "'true'"))
    slurmkit(tmp_path, "render", "--out", "x.sbatch")
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["git"] is None
    assert list(record["sources"]) == ["slurmkit.yaml"]


def test_git_that_does_not_let_itself_be_asked_stops_the_writing(project: Path) -> None:
    (project / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (project / ".git/config").write_text("[core\n")
    done = slurmkit(project, "render", "--out", "jobs/x.sbatch")
    assert done.code == 1
    assert "bad config" in done.err
    assert list((project / "jobs").iterdir()) == []


def test_a_hook_s_own_repository_is_not_taken_for_the_project_s(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_project(tmp_path / "other")
    (other / "another").touch()
    commit(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    slurmkit(project, "render", "--out", "jobs/x.sbatch")
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    record = json.loads((project / "jobs/x.json").read_text())
    assert record["git"]["commit"] == git(project, "rev-parse", "HEAD").strip()


@pytest.mark.parametrize("in_the_way", ["x.sbatch", "x.json"])
def test_when_one_of_the_two_cannot_be_written_neither_is_changed(project: Path, in_the_way: str) -> None:
    assert slurmkit(project, "render", "--out", "jobs/x.sbatch").code == 0
    (project / "jobs" / in_the_way).unlink()
    (project / "jobs" / in_the_way).mkdir()
    before = {path: path.read_bytes() for path in (project / "jobs").iterdir() if path.is_file()}
    done = slurmkit(project, "render", "--nodes", "4", "--out", "jobs/x.sbatch")
    assert done.code == 1
    assert f"jobs/{in_the_way} cannot be written: Is a directory" in done.err
    assert {path: path.read_bytes() for path in (project / "jobs").iterdir() if path.is_file()} == before
    assert len(list((project / "jobs").iterdir())) == 2


def test_files_written_together_that_were_not_there_before_are_gone_again(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(Failure):
        write_together({tmp_path / "a": "new", tmp_path / "b": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
