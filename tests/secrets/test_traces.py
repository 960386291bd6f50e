"""A job's secrets leave no trace: searched for while it trains and afterwards, by a search that is shown to find."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, development_cluster, wait_until
from tests.support.requirements import REPOSITORY
from tests.support.secret_search import Canaries
from tests.support.secret_traces import Traces

pytestmark = pytest.mark.slurm

LEAK = Path(__file__).with_name("leak.py")
# For each process that holds them: sha256 of its variables' values. Its environment, not what a tool makes of it.
ENVIRONMENTS = """
import glob, hashlib, json
found = {}
for folder in glob.glob("/proc/[0-9]*"):
    try:
        name = open(folder + "/cmdline").read().replace("\\0", " ").strip()
        variables = open(folder + "/environ", "rb").read().split(b"\\0")
    except OSError:
        continue
    found[name] = {v.partition(b"=")[0].decode(): hashlib.sha256(v.partition(b"=")[2]).hexdigest() for v in variables}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plain_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, and an accounting that does not keep environments."""
    site = tmp_path_factory.mktemp("site") / "slurm.conf"
    site.write_text("AccountingStoreFlags=job_comment,job_script\n")
    with development_cluster(f"s{secrets.token_hex(3)}", "--nodes", "2", "--conf", str(site)) as own:
        yield own


def submitted(cluster: Cluster, here: Path, *arguments: str | Path, **environment: str) -> str:
    done = cluster.slurmkit(here, "submit", "-N", "2", *arguments, ray=True, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()[1]


def wait_for_end(cluster: Cluster, job_id: str) -> None:
    wait_until(lambda: not cluster.ask("squeue", "-h", "-j", job_id).strip(), "the job ends", 150)


def kept_private(path: Path, value: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(value + "\n")
    return path


def holders(cluster: Cluster, node: str, process: str, canaries: Canaries) -> bool:
    """Whether that process has all these variables, each with its value."""
    processes = json.loads(cluster.on_node(node, "python3", "-c", ENVIRONMENTS))
    [has] = [variables for name, variables in processes.items() if re.search(process, name)]
    return all(has.get(name) == sha256(value.encode()).hexdigest() for name, value in canaries.items())


def test_secrets_reach_the_driver_and_ray_s_workers_and_leave_no_trace(
    plain_cluster: Cluster, shared_path: Path, tmp_path: Path
) -> None:
    since = time.time() - 1
    named = {
        "HF_TOKEN": "hf_" + secrets.token_hex(17),
        "WANDB_API_KEY": secrets.token_hex(20),
        "OPENAI_API_KEY": "sk-proj-" + secrets.token_urlsafe(40),
        "SERVICE_PASSWORD": secrets.token_hex(12),
    }
    key, safe = (kept_private(tmp_path / name, named[name]) for name in ("WANDB_API_KEY", "OPENAI_API_KEY"))
    (shared_path / "slurmkit.yaml").write_text(
        "secrets:\n"
        "  HF_TOKEN: env\n"
        f"  WANDB_API_KEY: {{file: '{key}'}}\n"
        f"  OPENAI_API_KEY: {{command: [cat, '{safe}']}}\n"
        "  SERVICE_PASSWORD: {env: OTHER_PASSWORD}\n"
    )
    # One that nobody named travels as well, as with any sbatch, and has to be as safe.
    unnamed = {"UNNAMED_PASSWORD": secrets.token_hex(12), "OTHER_PASSWORD": named["SERVICE_PASSWORD"]}
    job_id = submitted(
        plain_cluster, shared_path, "--config", REPOSITORY / "examples/grpo_arithmetic.yaml",
        *("grpo.max_num_steps=100000", "grpo.max_steps_without_signal=null", "++grpo.num_prompts_per_step=4"),
        *("policy.from_scratch.supervised_steps=1", "grpo.max_val_samples=8", "grpo.val_at_start=false"),
        *("grpo.val_period=2", "checkpointing.save_period=2"),
        HF_TOKEN=named["HF_TOKEN"], **unnamed,
    )  # fmt: skip
    run_dir = shared_path / "results/grpo_arithmetic"
    traces = Traces(plain_cluster, job_id, since, run_dir / "attempts/latest")
    wait_until((run_dir / "step_2/manifest.json").exists, "two steps and a checkpoint", 150)

    driver = rf"^{re.escape(os.path.dirname(sys.executable))}/python\S* -m slurmkit\.grpo"
    for node, process in (("node1", driver), ("node1", "^ray::Pol"), ("node2", "^ray::Pol")):
        assert holders(plain_cluster, node, process, {**named, **unnamed}), f"{process} on {node}"
    token = traces.attempt / "bringup/token"
    canaries = {**named, **unnamed, "Ray's token": token.read_text()}
    # Where the values come from, and where Slurm, as root, keeps a job's environment until it forgets the job.
    environment = f"{traces.state}/local/slurmctld/hash.{int(job_id) % 10}/job.{job_id}/environment"
    expected = {(f"controller:{environment}", label) for label in (*named, *unnamed)}
    expected |= {(str(key), "WANDB_API_KEY"), (str(safe), "OPENAI_API_KEY")}
    assert traces.everywhere(canaries, running=True) == expected | {(str(token.resolve()), "Ray's token")}
    assert plain_cluster.on_node("controller", "stat", "-c", "%U %a", environment) == "root 600\n"
    told = traces.ray()
    for source, sign in (
        ("actors", b"PolicyWorker"),
        ("jobs", b"slurmkit.grpo"),
        ("tasks", b"collect"),
        ("workers", b"raylet"),
        ("nodes", b"node2"),
        ("key-value store", b"session_name"),
    ):
        assert sign in told[source], f"Ray's {source} were searched"

    listed = plain_cluster.on_node("node1", "ps", "-ww", "-eo", "args").splitlines()
    assert all("--host=127.0.0.1" in line for line in listed if "dashboard/dashboard.py" in line)
    assert ":8265" not in plain_cluster.on_node("node1", "ss", "-Hltn")
    assert open_to_others(run_dir) == []
    for node in ("node1", "node2"):
        assert plain_cluster.on_node(node, "sh", "-c", "stat -c %a /tmp/sk-*") == "700\n"

    plain_cluster.ask("scancel", job_id)
    wait_for_end(plain_cluster, job_id)
    assert plain_cluster.ended(job_id).startswith("CANCELLED")
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    kept = [path.read_bytes() for path in run_dir.glob("wandb/data/artifacts/staging/*") if path.is_file()]
    assert (run_dir / "job.sbatch").read_bytes() in kept, "what is uploaded is searched"
    assert traces.everywhere(canaries, running=False) == expected
    assert open_to_others(run_dir) == []


def open_to_others(folder: Path) -> list[str]:
    """Files and folders that others may read or change. What the run removes meanwhile is passed over."""
    found = []
    for path in (path for parent, _, names in os.walk(folder) for path in (parent, *(f"{parent}/{n}" for n in names))):
        with suppress(FileNotFoundError):
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode) and mode & 0o077:
                found.append(path)
    return found


@pytest.fixture
def plain_python() -> Iterator[Path]:
    """This interpreter and its ray by a path without a space, which Ray's runtime environments cannot carry."""
    folder = Path(tempfile.mkdtemp(prefix="slurmkit-python-", dir="/var/tmp"))
    (folder / "venv").symlink_to(sys.prefix)
    for name, words in (("python", ""), ("ray", "-m ray.scripts.scripts ")):
        (folder / name).write_text(f'#!/bin/sh\nexec {folder}/venv/bin/python {words}"$@"\n')
        (folder / name).chmod(0o755)
    yield folder / "python"
    shutil.rmtree(folder)


def test_each_part_of_the_search_finds_what_leaks_there(
    plain_cluster: Cluster, shared_path: Path, plain_python: Path
) -> None:
    since = time.time() - 1
    leaks = (
        *("LEAK_DRIVER_LOG", "LEAK_WORKER_LOG", "LEAK_NODE_FILE", "LEAK_HOME", "LEAK_WANDB", "LEAK_ARGUMENT"),
        *("LEAK_RUNTIME_ENV", "LEAK_KEY_VALUE", "LEAK_ACTOR_NAME", "LEAK_TASK_NAME"),
    )
    canaries = {name: secrets.token_hex(20) for name in leaks}
    comment = secrets.token_hex(20)
    (shared_path / "slurmkit.yaml").write_text(f"secrets: [{', '.join(leaks)}]\npython: {plain_python}\n")
    job_id = submitted(
        plain_cluster, shared_path, "--name", "leak", "--comment", comment, "--", "python", LEAK, **canaries
    )
    run_dir = shared_path / "results/leak"
    traces = Traces(plain_cluster, job_id, since, run_dir / "attempts/latest")
    home = Path.home() / ".cache" / f"leak-{job_id}"
    try:
        wait_until((shared_path / "leaked").exists, "all leaks are made", 150)
        log = traces.state / "log/leak.log"
        log.write_text(f"said {canaries['LEAK_DRIVER_LOG']}")
        hits = traces.everywhere({**canaries, "comment": comment}, running=True)
    finally:
        home.unlink(missing_ok=True)
        plain_cluster.ask("scancel", job_id)
    wait_for_end(plain_cluster, job_id)
    hits |= set(traces.in_slurm({"comment": comment}))  # the accounting has it only from the job's end on
    [wandb] = shared_path.glob("wandb/offline-run-*/*.wandb")
    for where, label in (
        (str(run_dir / f"attempts/{job_id}.0/driver.log"), "LEAK_DRIVER_LOG"),
        (str(log), "LEAK_DRIVER_LOG"),
        (str(home), "LEAK_HOME"),
        (str(wandb), "LEAK_WANDB"),
        (str(run_dir / "job.sbatch"), "comment"),
        ("node2:/tmp/leak", "LEAK_NODE_FILE"),
        ("scontrol show job", "comment"),
        ("stored script", "comment"),
        ("squeue", "comment"),
        ("sacct", "comment"),
        ("sacct script", "comment"),
        ("ps on here", "LEAK_ARGUMENT"),
        ("ps on node2", "LEAK_ARGUMENT"),
        ("Ray's jobs", "LEAK_RUNTIME_ENV"),
        ("Ray's runtime environments of node2", "LEAK_RUNTIME_ENV"),
        ("Ray's key-value store", "LEAK_KEY_VALUE"),
        ("Ray's actors", "LEAK_ACTOR_NAME"),
        ("Ray's tasks", "LEAK_TASK_NAME"),
    ):
        assert (where, label) in hits
    assert any(where.startswith(f"node2:/tmp/sk-{job_id}.0/") and label == "LEAK_WORKER_LOG" for where, label in hits)


def test_a_cluster_whose_accounting_keeps_environments_is_warned_of(cluster: Cluster, shared_path: Path) -> None:
    value = secrets.token_hex(20)
    done = cluster.slurmkit(shared_path, "submit", "--set", "secrets.MY_TOKEN=env", "--", "true", MY_TOKEN=value)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: this cluster's accounting keeps every job's environment")
    assert "MY_TOKEN" in done.stderr
    job_id = done.stdout.split()[1]
    wait_until(lambda: value in cluster.ask("sacct", "--jobs", job_id, "--env-vars"), "the warning is true", 150)
    cluster.ask("scancel", job_id)
    wait_for_end(cluster, job_id)


def test_a_job_that_slurm_gave_no_secret_ends_at_once_and_names_it(cluster: Cluster, shared_path: Path) -> None:
    # Submitted by hand from a shell without it, as after a requeue on a site that drops the environment.
    arguments = ("--name", "x", "--set", "secrets.MY_TOKEN=env", "--", "touch", "started")
    script = cluster.slurmkit(shared_path, "render", *arguments).stdout
    (shared_path / "results/x").mkdir(parents=True)
    (shared_path / "job.sbatch").write_text(script)
    answer = cluster.ask("sh", "-c", f"cd '{shared_path}' && sbatch --wait --parsable job.sbatch || true")
    output = (shared_path / f"results/x/slurm-{answer.split()[0]}.out").read_text()
    assert "\nslurmkit: the secret MY_TOKEN is not in this job's environment" in output
    assert not (shared_path / "started").exists()


def test_a_site_may_open_a_run_to_its_group_but_never_ray_s_token(cluster: Cluster, shared_path: Path) -> None:
    show = 'stat -c "%a" "$SK_MEET/token" "$SK_MEET/head" >modes'
    done = cluster.slurmkit(shared_path, "submit", "--wait", "--set", "umask=027", "--", "bash", "-c", show)
    assert done.returncode == 0, done.stdout
    run_dir = shared_path / "results/bash"
    assert (shared_path / "modes").read_text().split() == ["600", "640"]
    assert {path.stat().st_mode & 0o777 for path in run_dir.rglob("*") if path.is_dir()} == {0o750}
    assert (next(run_dir.glob("slurm-*.out")).stat().st_mode & 0o777) == 0o640
