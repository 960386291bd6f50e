"""One suite for both ways to reach Slurm, on a real cluster: the same questions, the same answers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurmkit.errors import Failure, UserError
from slurmkit.slurm.client import Gres, JobState, Node, Partition, SlurmClient
from slurmkit.slurm.command import CommandClient
from slurmkit.slurm.connect import connect
from slurmkit.slurm.native import NativeClient
from tests.support.cluster import development_cluster

pytestmark = pytest.mark.slurm

# Jobs are forgotten as soon as Slurm allows; one partition is unlike the others.
SITE = """
MinJobAge=2
NodeName=DEFAULT Feature=ib,fast
PartitionName=batch Nodes=ALL Default=YES DefaultTime=00:10:00 MaxTime=1-00:00:00
PartitionName=high Nodes=node1 State=DOWN MaxTime=90
PartitionName=odd Nodes=node3 MaxNodes=1 MaxTime=UNLIMITED
"""
HOSTILE_NAME = "a b JobState=FAILED\nx|\x1f\x1e'é\"$(id)%j"
HOSTILE_COMMENT = "ExitCode=9:0 a=b\n12\x1f%x,;#"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """A cluster of three nodes; called, one of Slurm's own commands on it."""
    site = tmp_path_factory.mktemp("site") / "site.conf"
    site.write_text(SITE)

    def ask(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    with (
        development_cluster(f"client{os.getpid() % 100000}", "--nodes", "3", "--conf", site) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SLURM_CONF", cluster.configuration)
        ask("scontrol", "update", "PartitionName=odd", "Hidden=YES")
        yield ask


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="slurmkit client ", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def submit(slurm: Callable[..., str], folder: Path) -> Iterator[Callable[..., str]]:
    """submit(body, *directives) -> job id"""
    commands, job_ids = CommandClient(), []

    def submit(body: str, *directives: str) -> str:
        script = folder / "a script.sh"
        lines = ["#!/bin/bash", "#SBATCH --output=/dev/null", *(f"#SBATCH {line}" for line in directives), body]
        script.write_text("\n".join([*lines, ""]))
        job_ids.append(commands.submit(script))
        return job_ids[-1]

    yield submit
    for job_id in job_ids:
        commands.cancel(job_id)


def need_pyslurm() -> None:
    if not os.environ.get("SLURMKIT_PYSLURM_PYTHON") and importlib.util.find_spec("pyslurm") is None:
        pytest.skip("no pyslurm of this Slurm's release here: SLURMKIT_PYSLURM_PYTHON names a Python that has it")


@pytest.fixture(params=["command", "pyslurm"])
def client(slurm: Callable[..., str], request: pytest.FixtureRequest) -> Iterator[SlurmClient]:
    if request.param == "command":
        yield connect("command")
    else:
        need_pyslurm()
        native = connect("pyslurm")
        yield native
        assert isinstance(native, NativeClient)
        assert not native._given_up, "pyslurm, and not the commands in its place, has answered"


@pytest.fixture(scope="module")
def long_ago(slurm: Callable[..., str], submit: Callable[..., str]) -> dict[str, str]:
    """Jobs for the last tests: Slurm looks at time limits and forgets jobs about once a minute."""
    job_ids = {"late": submit("sleep 300", "--time=1"), "forgotten": submit("exit 7")}
    until(lambda: state(job_ids["late"]) == "RUNNING")
    # No limit is shorter than a minute, but an end can be.
    slurm("scontrol", "update", f"JobId={job_ids['late']}", "EndTime=now+1")
    return job_ids


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(job_id: str) -> str:
    job = CommandClient().job(job_id)
    return job.state if job else ""


def job_of(client: SlurmClient, job_id: str) -> JobState:
    job = client.job(job_id)
    assert job is not None
    return job


def test_how_a_job_ends_is_told_with_its_code_and_its_signal(
    client: SlurmClient, submit: Callable[..., str], long_ago: dict[str, str]
) -> None:
    good, bad, killed = submit("true"), submit("exit 7", "--nodes=2"), submit("kill -9 $$")
    running, waiting = submit("sleep 300"), submit("true", "--hold")
    until(lambda: state(running) == "RUNNING")
    client.cancel(running)
    client.cancel(waiting)
    job_ids = [good, bad, killed, running, waiting]
    until(lambda: all(job.is_final for job in client.jobs(job_ids)))
    jobs = client.jobs([*job_ids, "999999"])
    assert [job.job_id for job in jobs] == job_ids, "in their order, and without the one that never was"
    assert [(job.state, job.exit_code, job.signal, job.code) for job in jobs] == [
        ("COMPLETED", 0, 0, 0),
        ("FAILED", 7, 0, 7),
        ("FAILED", 0, 9, 137),
        ("CANCELLED", 0, jobs[3].signal, jobs[3].code),
        ("CANCELLED", 0, 0, 1),
    ]
    assert jobs[3].code != 0
    assert jobs[1].nodes == "node[1-2]"
    assert jobs[1].reason == "NonZeroExitCode"
    assert [client.job(job.job_id) for job in jobs] == list(jobs)
    assert client.job("999999") is None


def test_a_running_job_has_a_start_and_an_end_and_a_waiting_one_a_reason(
    client: SlurmClient, submit: Callable[..., str]
) -> None:
    running, waiting = (
        submit("sleep 300", "--nodes=2"),
        submit("true", f"--dependency=after:{submit('true', '--hold')}"),
    )
    until(lambda: state(running) == "RUNNING")
    job = job_of(client, running)
    assert (job.state, job.nodes, job.partition, job.time_limit, job.restarts) == (
        "RUNNING", "node[1-2]", "batch", 10, 0
    )  # fmt: skip
    assert job.submitted is not None
    assert job.start is not None
    assert job.end is not None
    assert job.submitted <= job.start < job.end
    assert time.strptime(job.start, "%Y-%m-%dT%H:%M:%S")
    job = job_of(client, waiting)
    assert (job.state, job.reason, job.nodes, job.start, job.end) == ("PENDING", "Dependency", "", None, None)
    client.cancel(running)
    unlimited = submit("sleep 300", "--partition=odd", "--time=UNLIMITED")
    until(lambda: state(unlimited) == "RUNNING")
    job = job_of(client, unlimited)
    assert (job.time_limit, job.end) == (None, None)
    client.cancel(unlimited)


def test_a_job_is_held_and_released(client: SlurmClient, submit: Callable[..., str]) -> None:
    job_id = submit("true", "--begin=now+1hour", "--time=7", "--comment=kept")
    client.hold(job_id)
    assert job_of(client, job_id).reason.startswith("JobHeld")
    client.release(job_id)
    until(lambda: job_of(client, job_id).reason == "BeginTime")
    job = job_of(client, job_id)
    assert (job.state, job.time_limit, job.comment) == ("PENDING", 7, "kept")
    held = submit("true", "--hold")
    assert job_of(client, held).reason == "JobHeldUser"
    client.release(held)
    until(lambda: job_of(client, held).state == "COMPLETED")


def test_signal_reaches_the_batch_script_and_fails_if_none_runs(
    client: SlurmClient, submit: Callable[..., str], folder: Path
) -> None:
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    job_id = submit(f"trap 'exit 3' USR2\ntouch '{ready}'\nsleep 300 & wait")
    until(ready.exists)
    client.signal(job_id, "USR2")
    until(lambda: job_of(client, job_id).is_final)
    assert job_of(client, job_id).exit_code == 3
    for one in (job_id, submit("true", "--hold"), "999999"):
        with pytest.raises(Failure, match=r"does not run|Invalid job id"):
            client.signal(one, "USR2")


def test_cancelling_an_ended_job_is_no_error_but_a_slurm_refusal_is(
    client: SlurmClient, submit: Callable[..., str]
) -> None:
    job_id = submit("true")
    until(lambda: job_of(client, job_id).state == "COMPLETED")
    client.cancel(job_id)
    client.cancel("999999")
    assert job_of(client, job_id).state == "COMPLETED"
    for refused in (client.hold, client.release, client.requeue):
        with pytest.raises(Failure, match="Invalid job id"):
            refused("999999")
    with pytest.raises(Failure, match="finished"):
        client.hold(job_id)


def test_a_requeued_job_waits_again_and_counts_it(client: SlurmClient, submit: Callable[..., str]) -> None:
    job_id = submit("sleep 300")
    until(lambda: state(job_id) == "RUNNING")
    client.requeue(job_id)
    until(lambda: job_of(client, job_id).state == "PENDING")
    assert job_of(client, job_id).restarts == 1
    client.cancel(job_id)


def test_array_tasks_are_found_and_controlled_singly_and_together(
    client: SlurmClient, submit: Callable[..., str]
) -> None:
    # Task 0 is not "no task"; and what waits is one row.
    array = submit(
        "(( SLURM_ARRAY_TASK_ID == 1 )) && exit 5; (( SLURM_ARRAY_TASK_ID )) && sleep 300; true", "--array=0-5%2"
    )
    until(lambda: {job.state for job in client.jobs([f"{array}_2"])} == {"RUNNING"})
    jobs = {job.job_id: job for job in client.jobs([array])}
    assert set(jobs) == {*(f"{array}_{task}" for task in range(4)), f"{array}_[4-5]"}
    assert (jobs[f"{array}_0"].state, jobs[f"{array}_1"].exit_code) == ("COMPLETED", 5)
    assert jobs[f"{array}_[4-5]"].state == "PENDING"
    assert job_of(client, f"{array}_4").state == "PENDING"
    assert not job_of(client, f"{array}_[4-5]").is_final
    assert not job_of(client, array).is_final, "an array has not ended while a task has not"
    assert client.job(f"{array}_77") is None
    client.cancel(f"{array}_2")
    until(lambda: job_of(client, f"{array}_2").state == "CANCELLED")
    client.cancel(array)
    until(lambda: all(job.is_final for job in client.jobs([array])))
    assert job_of(client, array).code != 0, "nor has it succeeded where one has not"
    until(lambda: {job.job_id for job in client.accounting([array])} >= set(jobs) - {f"{array}_[4-5]"})


def test_hostile_name_and_comment_are_returned_unchanged(
    client: SlurmClient, slurm: Callable[..., str], folder: Path
) -> None:
    script = ["--hold", "-o", "/dev/null", "--wrap", "true"]
    job_id = slurm("sbatch", "--parsable", "-J", HOSTILE_NAME, "--comment", HOSTILE_COMMENT, *script).strip()
    try:
        job = job_of(client, job_id)
        assert (job.name, job.comment, job.state, job.exit_code) == (HOSTILE_NAME, HOSTILE_COMMENT, "PENDING", 0)
        assert job in client.jobs(user="root")
    finally:
        slurm("scancel", job_id)
    recorded = HOSTILE_NAME.replace('"', "`")
    until(lambda: [(row.state, row.name) for row in client.accounting([job_id])] == [("CANCELLED", recorded)])


def test_partitions_and_nodes_are_told_with_their_limits_and_gres(
    client: SlurmClient, slurm: Callable[..., str]
) -> None:
    gpus = (Gres("gpu", "h100", 8),)
    one = ((16, 16), (64000, 64000))
    assert client.partitions() == (
        Partition("batch", True, "UP", 3, 1440, 10, None, gpus, *one),
        Partition("high", False, "DOWN", 1, 90, None, None, gpus, *one),
        Partition("odd", False, "UP", 1, None, None, 1, gpus, *one),
    )
    slurm("scontrol", "update", "NodeName=node3", "State=DRAIN", "Reason=State=IDLE CPUs=3 | x")
    try:
        nodes = client.nodes()
        assert nodes[0] == Node("node1", nodes[0].state, 16, 64000, gpus, ("ib", "fast"), ("batch", "high"))
        assert [node.name for node in nodes] == ["node1", "node2", "node3"]
        assert nodes[2].state.startswith("IDLE+DRAIN")
    finally:
        slurm("scontrol", "update", "NodeName=node3", "State=RESUME")


def test_hidden_partitions_are_told_to_an_ordinary_user_too(
    slurm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sinfo", "scontrol"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nexec setpriv --reuid 65534 --clear-groups {shutil.which(name)} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [partition.name for partition in CommandClient().partitions()] == ["batch", "high", "odd"]
    assert CommandClient().nodes()[2].partitions == ("batch", "odd")


def test_both_clients_give_the_same_records(slurm: Callable[..., str], submit: Callable[..., str]) -> None:
    need_pyslurm()
    commands, native = connect("command"), connect("pyslurm")
    jobs = [submit("sleep 300", "--nodes=2", "--cpus-per-task=2"), submit("true", "--array=0-9:3%1", "--hold")]
    jobs += [submit("exit 1"), submit("true", "--begin=now+1hour"), submit("true", "--partition=high")]
    until(lambda: state(jobs[0]) == "RUNNING" and state(jobs[2]) == "FAILED")
    array = submit("true", "--array=0-9:3,1,2%2", "--hold")
    native.cancel(array)
    # What accounting has at first of a job that ended at once is not all.
    until(lambda: any(job.partition for job in commands.accounting([array])))
    until(lambda: all(job.partition for job in commands.accounting([array, jobs[2]])))
    assert [job.job_id for job in native.accounting([array])] == [f"{array}_[0-3,6,9]"]
    try:
        for ask in (
            lambda client: client.jobs(user="root"),
            lambda client: client.jobs(jobs),
            lambda client: client.nodes(),
            lambda client: client.partitions(),
            lambda client: client.accounting([array, jobs[2]]),
        ):
            assert ask(commands) == ask(native)
        assert len(native.jobs(jobs)) == len(jobs)
        assert isinstance(native, NativeClient)
        assert not native._given_up
    finally:
        for job_id in jobs:
            native.cancel(job_id)


@pytest.mark.parametrize("bad", ["", "abc", "-1", "12_", "12;13", "12 13", "--user=root", "12_[1", "١٢"])
def test_what_is_no_job_id_is_refused_before_slurm_hears_of_it(client: SlurmClient, bad: str) -> None:
    for call in (client.job, client.cancel, client.hold, client.requeue, client.release, client.script_of):
        with pytest.raises(UserError, match="is not the id of a job"):
            call(bad)


def test_nothing_asked_for_is_nothing_and_an_unknown_user_is_a_failure(client: SlurmClient) -> None:
    assert client.jobs() == client.jobs([]) == client.accounting([]) == ()
    with pytest.raises(Failure, match="knows no user 'nobody-of-this-name'"):
        client.jobs(user="nobody-of-this-name")


def test_a_controller_that_is_away_is_a_failure_in_slurm_s_words(
    client: SlurmClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path(os.environ["SLURM_CONF"]).read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("SlurmctldPort=", "MessageTimeout="))]
    (tmp_path / "slurm.conf").write_text("\n".join([*kept, "SlurmctldPort=9", "MessageTimeout=2", ""]))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    for call in (client.nodes, lambda: client.jobs(user="root"), lambda: client.cancel("1")):
        with pytest.raises(Failure, match="Unable to contact slurm controller"):
            call()


def test_a_job_beyond_its_time_is_told_as_that(client: SlurmClient, long_ago: dict[str, str]) -> None:
    until(lambda: job_of(client, long_ago["late"]).is_final, 120)
    job = job_of(client, long_ago["late"])
    assert job.state == "TIMEOUT"
    # The controller knows of the signal, and accounting does not.
    assert job.code in (1, 128 + 15)


def test_of_a_job_that_the_controller_has_forgotten_accounting_still_knows(
    client: SlurmClient, slurm: Callable[..., str], long_ago: dict[str, str]
) -> None:
    job_id = long_ago["forgotten"]
    until(lambda: job_id not in slurm("squeue", "-h", "-t", "all", "-o", "%i").split(), 120)
    job = job_of(client, job_id)
    assert (job.state, job.exit_code, job.nodes, job.time_limit, job.restarts) == ("FAILED", 7, "node1", 10, None)
    assert client.jobs([job_id]) == client.accounting([job_id]) == (job,)
    assert client.script_of(job_id).endswith(b"exit 7\n")
    with pytest.raises(Failure, match="Slurm has no script of job 999999"):
        client.script_of("999999")
