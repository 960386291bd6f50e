"""`slurmkit submit X.sbatch` and `slurmkit verify` on a real Slurm: what it stores, what is on disk, what is in git."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, wait_until
from tests.support.git_project import Done, commit, git, make_project, slurmkit

FILE = Path("jobs/x.sbatch")


def state_of(cluster: Cluster, job_id: str) -> str:
    found = re.search(r"JobState=(\S+)", cluster.ask("scontrol", "show", "job", job_id))
    assert found
    return found[1]


def verdicts(done: Done) -> dict[str, str]:
    """What `verify` says of each place, by the place's name without its folder."""
    lines = [re.match(r"(same|differs|missing) +(.+)", line) for line in done.out.splitlines()]
    return {re.sub(r"^/.*/", "", found[2]): found[1] for found in lines if found}


@pytest.fixture
def job(cluster: Cluster, shared_path: Path) -> Iterator[tuple[Path, str, str]]:
    """A committed file's job, held in the queue: the project, the job's id and the commit."""
    project = make_project(shared_path / "a project")
    slurmkit(project, "render", "--set", "sbatch.hold=true", "--out", FILE)
    head = commit(project)
    done = slurmkit(project, "submit", "--require-committed", FILE, SLURM_CONF=cluster.configuration)
    found = re.search(r"^job +(\d+)$", done.out, re.MULTILINE)
    assert found, done
    yield project, found[1], head
    cluster.ask("scancel", "--quiet", found[1])


def test_verify_finds_the_same_job_everywhere_pending_running_and_ended(
    cluster: Cluster, job: tuple[Path, str, str]
) -> None:
    project, job_id, head = job
    stored = cluster.ask("scontrol", "write", "batch_script", job_id, "-")
    assert stored == (project / FILE).read_text()
    attempt = json.loads((project / "results/x/run.json").read_text())["attempts"][0]
    assert attempt["job_id"] == job_id
    assert attempt["file"] == str(project / FILE)
    assert attempt["git"] == {"commit": head, "changed": {}, "tree": {}}
    everywhere = {
        "job.sbatch": "same",
        "run.json: digest of the spec": "same",
        "x.sbatch": "same",
        "x.json: digest of the spec": "same",
        f"git {head[:12]}:jobs/x.sbatch (when it was submitted)": "same",
        "git HEAD:jobs/x.sbatch": "same",
    }
    for state in ("PENDING", "RUNNING", "COMPLETED"):
        if state == "RUNNING":
            cluster.ask("scontrol", "release", job_id)
        if state == "COMPLETED":
            (project / "go").touch()
        wait_until(lambda state=state: state_of(cluster, job_id) == state, f"job {job_id} is {state}", 120)
        done = slurmkit(project / "jobs", "verify", job_id, SLURM_CONF=cluster.configuration)
        assert (done.code, verdicts(done), done.err) == (0, everywhere, "")
        assert "@@" not in done.out
    for folder, run in ((project, "x"), (project, "results/x"), (project / "jobs", project / "results/x")):
        named = slurmkit(folder, "verify", run, SLURM_CONF=cluster.configuration)
        assert (named.code, named.out, named.err) == (0, done.out, "")


def test_each_place_that_differs_is_named_with_its_difference(cluster: Cluster, job: tuple[Path, str, str]) -> None:
    project, job_id, head = job
    now, then = "git HEAD:jobs/x.sbatch", f"git {head[:12]}:jobs/x.sbatch (when it was submitted)"

    def differing() -> tuple[Done, dict[str, str]]:
        done = slurmkit(project, "verify", job_id, SLURM_CONF=cluster.configuration)
        return done, {name: verdict for name, verdict in verdicts(done).items() if verdict != "same"}

    file, script = project / FILE, (project / FILE).read_text()
    file.write_text(script.replace("--nodes=2", "--nodes=1"))
    done, found = differing()
    assert (done.code, found) == (1, {"x.sbatch": "differs"})
    assert f"--- job {job_id}\n+++ {file}\n" in done.out
    assert "-#SBATCH --nodes=2\n+#SBATCH --nodes=1\n" in done.out

    commit(project)
    assert differing()[1] == {"x.sbatch": "differs", now: "differs"}
    git(project, "reset", "--quiet", "--hard", head)
    assert differing()[1] == {}

    in_run = project / "results/x/job.sbatch"
    in_run.write_text(script + "# more\n")
    assert differing()[1] == {"job.sbatch": "differs"}
    in_run.unlink()
    assert differing()[1] == {"job.sbatch": "missing"}
    in_run.write_text(script)

    record = project / "jobs/x.json"
    record.write_text(record.read_text().replace('"nodes": 2', '"nodes": 3'))
    assert differing()[1] == {"x.json: digest of the spec": "differs"}
    record.unlink()
    assert differing()[1] == {"x.json: digest of the spec": "missing"}
    (project / ".git").rename(project / "not git")
    assert differing()[1] == {"x.json: digest of the spec": "missing"} | {
        place.replace("jobs/", ""): "missing" for place in (now, then)
    }


def test_verify_reports_a_run_directory_overwritten_by_a_later_attempt(
    cluster: Cluster, job: tuple[Path, str, str]
) -> None:
    project, job_id, _ = job
    cluster.ask("scancel", job_id)
    wait_until(lambda: state_of(cluster, job_id) == "CANCELLED", f"job {job_id} is cancelled", 120)
    again = slurmkit(
        project, "submit", "--nodes", "1", "--set", "sbatch.hold=true", SLURM_CONF=cluster.configuration
    ).out
    later = again.split()[1]
    done = slurmkit(project, "verify", job_id, SLURM_CONF=cluster.configuration)
    assert done.code == 1
    assert f"differs  {project}/results/x/job.sbatch (written again for job {later})\n" in done.out
    plain = slurmkit(project, "verify", later, SLURM_CONF=cluster.configuration)
    assert (plain.code, verdicts(plain)) == (0, {"job.sbatch": "same", "run.json: digest of the spec": "same"})
    cluster.ask("scancel", later)


def test_what_cannot_be_compared_is_said_with_exit_code_2(cluster: Cluster, shared_path: Path) -> None:
    other = cluster.ask("sbatch", "--parsable", "--hold", "--wrap", "true").strip()
    for job_id, message in (
        (other, f"job {other} is not slurmkit's: its script does not begin as one that slurmkit rendered"),
        ("999999", "job 999999: nothing to compare, Slurm "),
        ("x", "x: no run of that name in "),
    ):
        done = slurmkit(shared_path, "verify", job_id, SLURM_CONF=cluster.configuration)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    cluster.ask("scancel", other)


def test_a_shell_s_functions_stay_outside_and_a_dirty_tree_is_reported(cluster: Cluster, shared_path: Path) -> None:
    project = make_project(shared_path / "a project")
    (project / "work.sh").write_text("touch committed\n")
    (project / "slurmkit.yaml").write_text("name: x\nnodes: 1\ncommand: [bash, work.sh]\n")
    slurmkit(project, "render", "--out", FILE)
    head = commit(project)
    (project / "work.sh").write_text("touch edited\n")
    evil = shared_path / "evil.sh"
    evil.write_text(f"touch '{shared_path}/bash-env'\n")
    shell = {
        f"BASH_FUNC_{name}%%": f"() {{ touch '{shared_path}/{name}'; {run} {name} \"$@\"\n}}"
        for name, run in (("srun", "command"), ("umask", "builtin"))
    } | {"BASH_ENV": str(evil)}
    submitted = cluster.slurmkit(project, "submit", "--require-committed", "--wait", FILE, timeout=180, **shell)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    differing = "work.sh (modified)"
    assert f"warning: the work tree differs from HEAD, and the job runs its files: {differing}\n" in submitted.stderr
    done = slurmkit(project, "verify", "x", SLURM_CONF=cluster.configuration)
    found = {name: verdict for name, verdict in verdicts(done).items() if verdict != "same"}
    assert (done.code, found) == (1, {f"work tree when it was submitted, against {head}: {differing}": "differs"})
    assert [name for name in ("srun", "umask", "bash-env") if (shared_path / name).exists()] == []
    assert [(project / name).exists() for name in ("edited", "committed")] == [True, False]
