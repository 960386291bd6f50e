"""A rendered file on its way into the queue: as it is, or refused with what to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from slurmkit.config.validate import shown
from slurmkit.errors import UserError
from slurmkit.job.settle import Request, settle
from slurmkit.run.committed import few, read_committed
from tests.support.git_project import commit, git, make_project, slurmkit
from tests.support.requirements import REPOSITORY

FILE = Path("jobs/x.sbatch")
EXAMPLE = REPOSITORY / "examples/grpo_arithmetic.yaml"
AGAIN = "SLURMKIT_SITE='' slurmkit render --out jobs/x.sbatch"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one rendered file, both committed."""
    project = make_project(tmp_path / "a project")
    slurmkit(project, "render", "--out", FILE)
    commit(project)
    return project


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_committed_file_keeps_its_settled_job_and_records_its_commit(project: Path) -> None:
    with chdir(project):
        slurmkit(project, "render", "--config", EXAMPLE, "--nodes", "2", "--out", FILE)
        head = commit(project)
        (project / "slurmkit.yaml").write_text("nodes: 4\nbroken: [\n")
        have, script, provenance = read_committed(Request(run_file=FILE), require=True, environ={})
        assert script.encode() == (project / FILE).read_bytes()
        digest = hashlib.sha256(script.encode()).hexdigest()
        assert provenance == {
            "file": str(project / FILE),
            "sha256": digest,
            "git": {"commit": head, "changed": {}, "tree": {"slurmkit.yaml": "modified"}},
        }
        git(project, "checkout", "slurmkit.yaml")
        want = settle(Request(config=EXAMPLE, flags={"nodes": 2}), project, {})
    assert (have.spec, have.train, have.identity) == (want.spec, want.train, want.identity)
    assert have.origins["nodes"] == "command line: nodes"
    assert have.origins["time"] == want.origins["time"] == "default"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--nodes", "4"], "nodes"),
        (["--exclusive"], "exclusive"),
        (["--name", "y"], "name"),
        (["--env", "A=2"], "env.A"),
        (["--set", "time=3"], "time"),
        (["--config", str(EXAMPLE)], "config"),
        (["--profile", "big"], "profile"),
        (["grpo.seed=2"], "grpo.seed=2"),
        (["--", "true"], "command"),
    ],
)
def test_whatever_would_change_the_job_is_refused(project: Path, arguments: list[str], key: str) -> None:
    done = slurmkit(project, "submit", FILE, *arguments)
    assert done.code == 2
    assert done.err == (
        f"error: jobs/x.sbatch is submitted as it is, so {key} cannot be given with it; change it where the job is "
        f"described and render it again: {AGAIN}\n"
    )


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("x.sbatch", "--nodes=2", "--nodes=3", "jobs/x.sbatch was edited since it was rendered"),
        ("x.sbatch", "# spec      sha256:", "# spec      sha256:0", "does not begin as a file that slurmkit rendered"),
        ("x.json", '"nodes": 2', '"nodes": 3', "the spec in jobs/x.json is not the one that it was rendered from"),
        ("x.json", '"nodes": 2,', "", "the spec in jobs/x.json is not the one that it was rendered from"),
        ("x.json", "{", "", "jobs/x.json: is not the record of a rendered file"),
    ],
)
def test_a_file_that_is_not_what_was_rendered_is_refused(
    project: Path, name: str, old: str, new: str, message: str
) -> None:
    edit(project / "jobs" / name, old, new)
    done = slurmkit(project, "submit", FILE)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_file_without_its_record_is_refused(project: Path) -> None:
    (project / "jobs/x.json").unlink()
    done = slurmkit(project, "submit", FILE)
    assert done.code == 2
    assert done.err == (
        "error: jobs/x.sbatch has no x.json beside it, which says what it was rendered from; render it with its "
        "record: slurmkit render … --out jobs/x.sbatch\n"
    )


def staged(project: Path) -> None:
    slurmkit(project, "render", "--nodes", "3", "--out", FILE)
    git(project, "add", "--all")


def assumed(project: Path) -> None:
    git(project, "update-index", "--assume-unchanged", str(FILE), "jobs/x.json")
    slurmkit(project, "render", "--nodes", "3", "--out", FILE)


DIRTY: dict[str, tuple[Callable[[Path], object], str]] = {
    "staged": (staged, "jobs/x.sbatch (modified) and jobs/x.json (modified)"),
    "hidden": (assumed, "jobs/x.sbatch (modified) and jobs/x.json (modified)"),
    "removed": (lambda project: git(project, "rm", "--cached", "jobs/x.json"), "jobs/x.json (untracked)"),
    "never added": (
        lambda project: git(project, "update-ref", "-d", "HEAD"),
        "jobs/x.sbatch (new file) and jobs/x.json (new file)",
    ),
    "ignored": (
        lambda project: (
            git(project, "rm", "--cached", "-r", "jobs"),
            (project / ".gitignore").write_text("jobs/\n"),
        ),
        "jobs/x.sbatch (ignored) and jobs/x.json (ignored)",
    ),
}


@pytest.mark.parametrize("what", DIRTY)
def test_require_committed_refuses_what_git_has_otherwise_in_git_s_words(project: Path, what: str) -> None:
    change, words = DIRTY[what]
    change(project)
    done = slurmkit(project, "submit", "--require-committed", FILE)
    assert done.code == 2
    assert done.err == f"error: only a committed file may be submitted; git says {words}: commit first\n"
    with chdir(project):
        provenance = read_committed(Request(run_file=FILE), require=False, environ={})[2]
    assert " and ".join(f"jobs/{name} ({word})" for name, word in provenance["git"]["changed"].items()) == words


def test_outside_git_nothing_is_committed(project: Path) -> None:
    (project / ".git").rename(project / "not git")
    assert "is in no git repository" in slurmkit(project, "submit", "--require-committed", FILE).err
    with chdir(project):
        assert "git" not in read_committed(Request(run_file=FILE), require=False, environ={})[2]


def test_only_a_rendered_file_can_be_required_to_be_committed(project: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("\nrequire_committed: true\n")
    for options, environment, rule in (
        (["--require-committed"], {}, "--require-committed"),
        ([], {"SLURMKIT_SITE": str(site)}, f"{site}:2"),
    ):
        done = slurmkit(project, "submit", *options, **environment)
        assert done.code == 2
        assert f"error: only a rendered file that is committed can be submitted ({rule}): slurmkit render" in done.err
    (project / "jobs/x.json").write_text((project / "jobs/x.json").read_text() + "\n")
    done = slurmkit(project, "submit", FILE, SLURMKIT_SITE=str(site))
    assert "git says jobs/x.json (modified)" in done.err


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("limits: {nodes: {max: 1}}", "nodes: 2 (slurmkit.yaml:2) is above the maximum of 1"),
        ("defaults: {partition: big}\nlock: [partition]", "partition cannot be left out: the site locks it to 'big'"),
        ("require: [account]", "account must be given: the site requires it"),
        ("forbid: {env: [A*]}", "env.A (slurmkit.yaml:3) cannot be set: the site forbids A*"),
    ],
)
def test_current_site_rules_apply_to_a_file_rendered_elsewhere(
    project: Path, tmp_path: Path, rules: str, message: str
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"{rules}\n")
    done = slurmkit(project, "submit", FILE, SLURMKIT_SITE=str(site))
    assert done.code == 2
    assert message in done.err


def test_site_rules_on_keys_that_resolve_to_others_accept_a_rendered_file(project: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "defaults: {results_dir: /scratch, time: 30}\nlock: [results_dir, time, templates]\nrequire: [nodes]\n"
    )
    slurmkit(project, "render", "--out", FILE, SLURMKIT_SITE=str(site))
    with chdir(project):
        read_committed(Request(run_file=FILE), require=False, environ={"SLURMKIT_SITE": str(site)})
        site.write_text(site.read_text().replace("time: 30", "time: 31"))
        with pytest.raises(UserError, match=r"time: '30' .* the site locks it to 31"):
            read_committed(Request(run_file=FILE), require=False, environ={"SLURMKIT_SITE": str(site)})


def test_a_committed_file_keeps_the_site_s_rules_of_today_for_templates(project: Path, tmp_path: Path) -> None:
    (project / "mine").mkdir()
    line = '{% extends "slurmkit/job.sbatch.j2" %}{% block directives %}{{ super() }}#SBATCH --qos=x\n{% endblock %}\n'
    (project / "mine/job.sbatch.j2").write_text(line)
    assert slurmkit(project, "render", "--set", "templates=mine", "--out", FILE).code == 0
    site = tmp_path / "site.yaml"
    for rules, refusal in (
        ("lock: [qos]\n", f"qos: 'x' ({project}/mine/job.sbatch.j2: a #SBATCH line) cannot be set: the site locks it"),
        (
            "lock: [templates]\n",
            f"templates: {shown(f'{project}/mine')} (the rendered file's record) cannot be set: the site locks it",
        ),
    ):
        site.write_text(rules)
        done = slurmkit(project, "submit", FILE, SLURMKIT_SITE=str(site))
        assert (done.code, refusal in done.err) == (2, True), done.err


def test_a_work_tree_that_differs_from_head_is_recorded_and_named(project: Path) -> None:
    (project / "work.sh").write_text("good\n")
    commit(project)
    (project / "work.sh").write_text("evil\n")
    with chdir(project):
        provenance = read_committed(Request(run_file=FILE), require=True, environ={})[2]
    assert provenance["git"]["tree"] == {"work.sh": "modified"}
    assert few({**provenance["git"]["tree"], "a": "deleted", "b": "modified", "c": "modified"}) == (
        "work.sh (modified), a (deleted), b (modified) and 1 more"
    )


def test_render_makes_the_folder_of_out(project: Path) -> None:
    assert slurmkit(project, "render", "--out", "new/folder/x.sbatch").code == 0
    assert (project / "new/folder/x.json").exists()


def test_a_symbolic_link_is_named_with_the_file_to_submit(project: Path) -> None:
    for suffix in ("sbatch", "json"):
        (project / "jobs" / f"x.{suffix}").rename(project / f"x.{suffix}")
        (project / "jobs" / f"x.{suffix}").symlink_to(f"../x.{suffix}")
    commit(project)
    assert git(project, "status", "--porcelain") == ""
    done = slurmkit(project, "submit", "--require-committed", FILE)
    assert (done.code, done.err) == (
        2,
        "error: only a committed file may be submitted; jobs/x.sbatch is a symbolic link to ../x.sbatch, and git "
        "stores only the link: commit the sbatch file and its record where they are, and submit that file: "
        "slurmkit submit x.sbatch\n",
    )


def test_a_file_behind_a_symbolic_link_to_its_folder_is_committed(project: Path, tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/link").symlink_to(project / "jobs")
    with chdir(tmp_path / "deep"):
        have, _, provenance = read_committed(Request(run_file=Path("er/link/x.sbatch")), require=True, environ={})
    assert have.origins["nodes"] == "../a project/slurmkit.yaml:2"
    assert provenance["file"] == str(project / FILE)
    assert (provenance["git"]["changed"], provenance["git"]["tree"]) == ({}, {})


def test_origins_are_relative_to_the_working_directory(project: Path) -> None:
    slurmkit(project, "render", "--config", EXAMPLE, "--nodes", "3", "--out", FILE)
    for folder, file in ((project, FILE), (project / "jobs", Path("x.sbatch")), (project.parent, project / FILE)):
        with chdir(folder):
            have = read_committed(Request(run_file=file), require=False, environ={})[0]
            place = have.origins["name"].rpartition(":")[0]
            assert Path(place).resolve() == project / "slurmkit.yaml"
            assert not Path(place).is_absolute()
            assert Path(have.config_origins["grpo.num_prompts_per_step"].rpartition(":")[0]).resolve() == EXAMPLE
    assert have.origins["nodes"] == "command line: nodes"
