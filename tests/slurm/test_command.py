"""Slurm's commands where a site has set them up otherwise."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from slurmkit.errors import UserError
from slurmkit.slurm import parse
from slurmkit.slurm.client import Gres
from slurmkit.slurm.command import CommandClient, submission_environment
from tests.support.cluster import Cluster, development_cluster

HELD = "#!/bin/bash\n#SBATCH --output=/dev/null --hold\n"


@pytest.fixture
def client(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> CommandClient:
    monkeypatch.setenv("SLURM_CONF", cluster.configuration)
    return CommandClient()


def test_slurm_s_estimate_is_its_start_its_nodes_and_its_partition(client: CommandClient) -> None:
    estimate = client.test("#!/bin/sh\n#SBATCH --nodes=3 --partition=high\ntrue\n")
    assert estimate.start is not None
    assert time.strptime(estimate.start, "%Y-%m-%dT%H:%M:%S")
    assert (estimate.nodes, estimate.partition) == ("node[1-3]", "high")
    with pytest.raises(UserError, match="Slurm would refuse this job: sbatch failed"):
        client.test("#!/bin/sh\n#SBATCH --nodes=99\ntrue\n")


def test_a_job_inherits_the_environment_given_and_slurm_shows_it_nowhere(
    client: CommandClient, shared_path: Path, cluster: Cluster
) -> None:
    script, seen = shared_path / "a job.sh", shared_path / "seen"
    secret = "canary 'x'\n$y"
    script.write_text(
        f'#!/bin/bash\n#SBATCH --output=/dev/null\nprintf %s "$A_TOKEN" >"{seen}.new"; mv "{seen}.new" "{seen}"\n'
    )
    job_id = client.submit(script, {"A_TOKEN": secret})
    shown = cluster.ask("scontrol", "-o", "show", "job", job_id) + client.script_of(job_id).decode()
    deadline = time.monotonic() + 60
    while not seen.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert seen.read_text() == secret
    assert "canary" not in shown + cluster.ask("sacct", "-p", "-o", "ALL", "-j", job_id)
    assert "A_TOKEN" not in os.environ


def test_the_stored_script_is_read_back_byte_for_byte(client: CommandClient, shared_path: Path) -> None:
    script = shared_path / "job.sh"
    script.write_bytes(HELD.encode() + "printf '\r \x01 é\t'\n# the last line has no end".encode() + b" \xff")
    job_id = client.submit(script)
    assert client.script_of(job_id) == script.read_bytes()
    client.cancel(job_id)


@pytest.mark.parametrize(
    ("words", "estimate"),
    [
        ("using 4 processors on node1 in partition batch", ("2031-05-06T07:08:09", "node1", "batch")),
        ("using 1 processor on nodes node[1-2]", ("2031-05-06T07:08:09", "node[1-2]", "")),
        ("in partition batch", ("2031-05-06T07:08:09", "", "batch")),
        ("", ("2031-05-06T07:08:09", "", "")),
    ],
)
def test_an_estimate_needs_no_more_than_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, estimate: tuple[str, str, str]
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho 'sbatch: Job 7 to start at 2031-05-06T07:08:09 {words}' >&2\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert CommandClient().test("#!/bin/sh\n") == estimate


def test_the_caller_s_variables_hide_nothing_from_its_questions(
    client: CommandClient, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shared_path / "job.sh").write_text(HELD)
    job_id = client.submit(shared_path / "job.sh")
    for variable in ("SQUEUE_STATES=RUNNING", "SQUEUE_PARTITION=high", "SINFO_PARTITION=none", "SLURM_TIME_FORMAT=%s"):
        monkeypatch.setenv(*variable.split("="))
    job = client.job(job_id)
    assert job is not None
    assert job.submitted is not None
    assert "T" in job.submitted
    assert len(client.nodes()) == 4
    client.cancel(job_id)


def test_the_controller_hears_as_much_of_a_job_of_four_nodes_as_of_one(
    client: CommandClient, cluster: Cluster, shared_path: Path
) -> None:
    asked = []
    for nodes in (1, 4):
        script = shared_path / "job.sh"
        script.write_text(f"{HELD}#SBATCH --nodes={nodes}\n")
        before = requests(cluster)
        client.test(script.read_text())
        job_id = client.submit(script)
        client.job(job_id)
        client.jobs([job_id])
        client.script_of(job_id)
        client.release(job_id)
        client.cancel(job_id)
        asked.append(requests(cluster) - before)
    assert asked[0] == asked[1]
    assert 6 <= asked[0].total() <= 12, asked


def requests(cluster: Cluster) -> Counter[str]:
    """What slurmctld has been asked so far, without what its nodes and sdiag ask."""
    found = re.findall(r"(REQUEST_\w+) +\( *\d+\) count:(\d+)", cluster.ask("sdiag"))
    return Counter({name: int(count) for name, count in found if not re.search("STATS|COMPLETE|PING|NODE", name)})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpu:8", [Gres("gpu", "", 8)]),
        ("gpu:h100:8(S:0-1)", [Gres("gpu", "h100", 8)]),
        ("gpu:h100:4(S:0,2),gpu:a100:2", [Gres("gpu", "h100", 4), Gres("gpu", "a100", 2)]),
        ("shard:h100:32(h100:8/8),gpu", [Gres("shard", "h100", 32), Gres("gpu", "", 1)]),
        ("bandwidth:lustre:no_consume:4G", [Gres("bandwidth", "lustre", 4 * 1024**3)]),
        ("gpu:a100_3g.20gb:2,mps:800", [Gres("gpu", "a100_3g.20gb", 2), Gres("mps", "", 800)]),
        ("license", [Gres("license", "", 1)]),
        ("", []),
    ],
)  # fmt: skip
def test_gres_are_read_in_every_form_that_slurm_prints(text: str, found: list[Gres]) -> None:
    assert list(parse.gres_from(text)) == found


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("1-00:00:00", 1440), ("04:00:00", 240), ("30:00", 30), ("10-01:05:59", 14465), ("UNLIMITED", None)),
        *(("NONE", None), ("Partition_Limit", None), ("INVALID", None), ("", None)),
    ],
)
def test_time_limits_are_minutes(text: str, minutes: int | None) -> None:
    assert parse.minutes(text) == minutes


@pytest.mark.slurm
def test_forgotten_job_without_accounting_is_unknown_and_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with development_cluster(f"plain{os.getpid()}", "--nodes", "1", "--no-accounting") as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.configuration)
        assert CommandClient().job("4711") is None


def test_a_job_inherits_nothing_of_the_run_it_is_submitted_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **dict.fromkeys(("SK_MARK", "SK_ATTEMPT_DIR", "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_ID"), "x"),
        **{"TMPDIR": "/tmp/sk-5.0/tmp", "KEPT": "x"},
    }.items():
        monkeypatch.setenv(name, value)
    environment = submission_environment()
    assert environment["KEPT"] == "x"
    assert not [name for name in environment if name.startswith(("SK_", "RAY_", "TMPDIR"))]
    monkeypatch.delenv("SK_ATTEMPT_DIR")
    assert submission_environment()["RAY_JOB_ID"] == "x", "a user's own, outside of a run"


def test_no_function_and_no_option_of_the_shell_travels_with_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("BASH_FUNC_srun%%", "BASH_FUNC_module_x%%", "BASH_ENV", "SHELLOPTS", "BASHOPTS", "CDPATH", "GLOBIGNORE")
    kept = ("BASH_FUNC_module%%", "BASH_FUNC_ml%%", "BASH_FUNC__module_raw%%", "LD_PRELOAD", "ENV")
    for name in (*names, *kept):
        monkeypatch.setenv(name, "() {  :\n}")
    environment = submission_environment()
    assert not [name for name in names if name in environment]
    assert [name for name in kept if name not in environment] == []
