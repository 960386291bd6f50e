"""`slurmkit submit` on a real Slurm of four nodes: what arrives, what ends how, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, wait_until
from tests.support.requirements import HOSTILE, REPOSITORY, SLURMKIT

# The driver of these tests: asks Ray which nodes are there, as any driver would.
COUNT = """
import json, os, sys
import ray
ray.init(log_to_driver=False)
alive = [node for node in ray.nodes() if node["Alive"]]
gpus = [node["Resources"].get("GPU", 0) for node in alive]
print(json.dumps({"nodes": sorted(node["NodeManagerHostname"] for node in alive), "gpus": gpus}))
"""


def job_id_of(output: str) -> str:
    found = re.search(r"^job +(\d+)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def end_of(run_dir: Path) -> tuple[int, str, list[str], bool]:
    """What the latest attempt has recorded of its end: code, reason, bad nodes, whether it was cancelled."""
    found = json.loads((run_dir / "attempts/latest/end.json").read_text())
    return found["code"], found["reason"], found["bad_nodes"], found["cancelled"]


def is_active(cluster: Cluster, job_id: str) -> bool:
    return cluster.ask("squeue", "-h", "-j", job_id).strip() != ""


def left_on(cluster: Cluster, node: str, job_id: str) -> list[str]:
    """Processes of Ray or of a driver, and a job's folders, on one node."""
    processes = cluster.on_node(node, "ps", "-eo", "args").splitlines()
    files = cluster.on_node(node, "sh", "-c", f"ls -d /tmp/sk-{job_id}.* /tmp/ray 2>/dev/null").splitlines()
    return [line for line in processes if "raylet" in line or "gcs_server" in line or "/tmp/sk-" in line] + files


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_command_starts_when_every_node_and_gpu_is_registered(
    cluster: Cluster, shared_path: Path, nodes: int
) -> None:
    (shared_path / "count.py").write_text(COUNT)
    done = cluster.slurmkit(
        shared_path, "submit", "--wait", "-N", str(nodes), "--gres", "gpu:h100:8", "--name", "count",
        "--", "python", "count.py", ray=True,
    )  # fmt: skip
    run_dir = shared_path / "results/count"
    log = run_dir / "attempts/latest/driver.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    seen = json.loads(log.read_text().splitlines()[-1])
    assert seen == {"nodes": [f"node{i + 1}" for i in range(nodes)], "gpus": [8.0] * nodes}
    for fact in (
        f"rendered file  {run_dir}/job.sbatch",
        f"run directory  {run_dir}",
        f"slurmkit logs -f '{run_dir}'",
        "COMPLETED, exit code 0",
    ):
        assert fact in done.stdout
    for node in ("node1", "node2", "node3", "node4"):
        assert left_on(cluster, node, job_id_of(done.stdout)) == []


def test_command_environment_and_comment_arrive_exactly_as_typed(cluster: Cluster, shared_path: Path) -> None:
    values = [f"--env=V{index}={value}" for index, value in enumerate(HOSTILE)]
    # The end looks like what scontrol prints of a job's state, and must not be taken for it.
    comment = 'it\'s "50%" \\ $HOME # `id` é JobState=FAILED ExitCode=9:0 NodeList=x'
    show = 'printf "%s\\0" "$@" >arguments; for i in $(seq 0 16); do v=V$i; printf "%s\\0" "${!v}"; done >environment'
    done = cluster.slurmkit(
        shared_path, "submit", "--wait", "--comment", comment, *values, "--", "bash", "-c", show, "zero", *HOSTILE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = "".join(f"{value}\0" for value in HOSTILE)
    assert (shared_path / "arguments").read_text() == expected
    assert (shared_path / "environment").read_text() == expected
    assert f"Comment={comment} " in cluster.ask("scontrol", "-o", "show", "job", job_id_of(done.stdout))


def test_job_has_the_drivers_exit_code_and_its_output_has_the_log_tail(cluster: Cluster, shared_path: Path) -> None:
    done = cluster.slurmkit(shared_path, "submit", "--wait", "-N", "2", "--", "bash", "-c", "echo the reason; exit 7")
    assert done.returncode == 7
    job_id = job_id_of(done.stdout)
    assert "the reason" in (shared_path / f"results/bash/slurm-{job_id}.out").read_text()
    assert cluster.ended(job_id) == "FAILED|7:0"
    assert end_of(shared_path / "results/bash") == (7, "the command failed with exit code 7", [], False)


def test_the_caller_s_sbatch_and_slurm_variables_change_nothing(cluster: Cluster, shared_path: Path) -> None:
    done = cluster.slurmkit(
        shared_path,
        *("submit", "-N", "1", "--time", "7", "--name", "good", "--wait", "--", "true"),
        SBATCH_TIMELIMIT="1",
        SBATCH_JOB_NAME="evil",
        SBATCH_PARTITION="high",
        SBATCH_EXPORT="NONE",
        SLURM_NNODES="4",
        SLURM_NTASKS="9",
        SRUN_CPUS_PER_TASK="64",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = cluster.ask("scontrol", "-o", "show", "job", job_id_of(done.stdout))
    for fact in ("JobName=good", "TimeLimit=00:07:00", "Partition=batch", "NumNodes=1 "):
        assert fact in shown


def test_wandb_s_process_of_whoever_submits_is_not_the_job_s(cluster: Cluster, shared_path: Path) -> None:
    test = 'test "$WANDB_PROJECT ${WANDB_SERVICE-none}" = "mine none"'
    wandb = {"WANDB_PROJECT": "mine", "WANDB_SERVICE": "3-17-unix-/tmp/wandb-17/socket"}
    done = cluster.slurmkit(shared_path, "submit", "--wait", "-N", "1", "--", "bash", "-c", test, **wandb)
    assert done.returncode == 0, done.stdout + done.stderr


def test_slurm_stores_the_same_script_as_render_and_the_run_dir(cluster: Cluster, shared_path: Path) -> None:
    job = ["-N", "2", "--name", "same", "--comment", "é", "--", "true"]
    rendered = cluster.slurmkit(shared_path, "render", *job).stdout
    submitted = cluster.slurmkit(shared_path, "submit", *job)
    stored = cluster.ask("scontrol", "write", "batch_script", job_id_of(submitted.stdout), "-")
    cluster.ask("scancel", job_id_of(submitted.stdout))
    assert rendered == stored == (shared_path / "results/same/job.sbatch").read_text()


def test_script_changed_by_slurm_is_an_error_and_the_job_is_cancelled(cluster: Cluster, shared_path: Path) -> None:
    # A site's submission filter may rewrite a script; an sbatch that does so stands in for one.
    (shared_path / "bin").mkdir()
    sbatch = shared_path / "bin/sbatch"
    sbatch.write_text(
        "#!/bin/bash\n"
        '[[ $1 == --test-only ]] && exec /usr/bin/sbatch "$1"\n'
        'sed "s/^exit/: exit/" "$2" >changed\n'
        'exec /usr/bin/sbatch "$1" changed\n'
    )
    sbatch.chmod(0o755)
    path = f"{shared_path}/bin:{os.environ['PATH']}"
    done = cluster.slurmkit(shared_path, "submit", "--", "sleep", "60", PATH=path)
    assert done.returncode == 1
    assert "the script that Slurm stored for job" in done.stderr
    job_id = json.loads((shared_path / "results/sleep/run.json").read_text())["attempts"][0]["job_id"]
    wait_until(lambda: not is_active(cluster, job_id), "the job is cancelled")


def test_a_dry_run_prints_the_file_and_changes_nothing(cluster: Cluster, shared_path: Path) -> None:
    job = "-N", "2", "--name", "never-submitted", "--", "true"
    dry = cluster.slurmkit(shared_path, "submit", "--dry-run", *job)
    assert dry.returncode == 0
    assert dry.stdout == cluster.slurmkit(shared_path, "render", *job).stdout
    assert list(shared_path.iterdir()) == []
    assert "never-submitted" not in cluster.ask("squeue", "-h", "-t", "all", "-o", "%j").split()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--nodes", "9"], "Requested node configuration is not available"),
        (["--gres", "gpu:tpu:1"], "Requested node configuration is not available"),
        (["--set", "sbatch.not-an-option=1"], "unrecognized option '--not-an-option=1'"),
    ],
)
def test_a_refusal_by_sbatch_is_told_in_slurm_s_words_and_leaves_nothing(
    cluster: Cluster, shared_path: Path, options: list[str], reason: str
) -> None:
    done = cluster.slurmkit(shared_path, "submit", *options, "--", "true")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Slurm would refuse this job: sbatch failed with exit code ")
    assert reason in done.stderr
    assert list(shared_path.iterdir()) == []


def test_a_submission_that_is_refused_at_the_last_moment_leaves_nothing(cluster: Cluster, shared_path: Path) -> None:
    # As when somebody else uses up an account's last job in between; an sbatch that says so stands in for that.
    (shared_path / "bin").mkdir()
    sbatch = shared_path / "bin/sbatch"
    sbatch.write_text(
        "#!/bin/bash\n"
        '[[ $1 == --test-only ]] && exec /usr/bin/sbatch "$1"\n'
        'echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1\n'
    )
    sbatch.chmod(0o755)
    path = f"{shared_path}/bin:{os.environ['PATH']}"
    done = cluster.slurmkit(shared_path, "submit", "--", "true", PATH=path)
    assert done.returncode == 1
    assert "Job violates accounting/QOS policy" in done.stderr
    assert [entry.name for entry in shared_path.iterdir()] == ["bin"]


def test_a_run_has_one_job_at_a_time_and_going_on_is_another_attempt(cluster: Cluster, shared_path: Path) -> None:
    command = ["--name", "x", "--", "bash", "-c", "until [[ -e go ]]; do sleep 0.1; done"]
    first = job_id_of(cluster.slurmkit(shared_path, "submit", *command).stdout)
    second = cluster.slurmkit(shared_path, "submit", *command)
    assert second.returncode == 2
    assert f"belongs to job {first}, which is " in second.stderr
    (shared_path / "go").touch()
    wait_until(lambda: not is_active(cluster, first), "the first job ends")
    assert cluster.slurmkit(shared_path, "submit", "--wait", *command).returncode == 0
    assert len(json.loads((shared_path / "results/x/run.json").read_text())["attempts"]) == 2
    other = cluster.slurmkit(shared_path, "submit", "--name", "x", "--", "date")
    assert other.returncode == 2
    assert "holds a run with another command" in other.stderr


def test_two_jobs_share_nodes_at_the_same_time_and_see_only_their_own_ray(cluster: Cluster, shared_path: Path) -> None:
    (shared_path / "count.py").write_text(COUNT)
    script = 'touch "here.$1"; until [[ -e here.$2 ]]; do sleep 0.1; done; python count.py'
    jobs = {}
    for me, other in (("one", "two"), ("two", "one")):
        done = cluster.slurmkit(
            shared_path, "submit", "-N", "2", "--set", "nodelist=node[3-4]", "--gres", "gpu:h100:4",
            "--name", me, "--", "bash", "-c", script, "x", me, other, ray=True,
        )  # fmt: skip
        jobs[me] = job_id_of(done.stdout)
    wait_until(lambda: not any(is_active(cluster, job) for job in jobs.values()), "both jobs end", 180)
    for me in jobs:
        log = (shared_path / f"results/{me}/attempts/latest/driver.log").read_text()
        assert json.loads(log.splitlines()[-1]) == {"nodes": ["node3", "node4"], "gpus": [4.0, 4.0]}


def test_a_node_whose_ray_dies_ends_the_job_and_is_named(cluster: Cluster, shared_path: Path) -> None:
    done = cluster.slurmkit(shared_path, "submit", "-N", "2", "--name", "x", "--", "bash", "-c", "touch up; sleep 300")
    job_id = job_id_of(done.stdout)
    wait_until((shared_path / "up").exists, "the driver starts")
    cluster.on_node("node2", "sh", "-c", "kill -9 $(ps -eo pid,comm | awk '$2 == \"raylet\" {print $1}')")
    wait_until(lambda: not is_active(cluster, job_id), "the job ends")
    assert cluster.ended(job_id) == "FAILED|75:0"
    assert end_of(shared_path / "results/x") == (75, "node node2: its raylet died", ["node2"], False)
    output = (shared_path / f"results/x/slurm-{job_id}.out").read_text()
    assert "slurmkit: node node2: its raylet died" in output
    assert any((shared_path / "results/x/attempts/latest").glob("ray-node2/raylet*"))
    assert left_on(cluster, "node1", job_id) + left_on(cluster, "node2", job_id) == []


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("'[[ $SLURM_NODEID != 1 ]] || false'", "a line of setup or of the bring-up failed"),
        ("'[[ $SLURM_NODEID != 1 ]] || PATH=/bin'", "ray start failed 3 times"),
    ],
)
def test_a_node_that_cannot_join_ends_the_job_before_the_command_starts(
    cluster: Cluster, shared_path: Path, setup: str, reason: str
) -> None:
    (shared_path / "job.yaml").write_text(f"nodes: 2\nname: x\nsetup: [{setup}]\n")
    done = cluster.slurmkit(shared_path, "submit", "--wait", "job.yaml", "--", "touch", "started")
    assert done.returncode == 75
    output = (shared_path / f"results/x/slurm-{job_id_of(done.stdout)}.out").read_text()
    assert f"slurmkit: node node2: {reason}" in output
    assert not (shared_path / "started").exists()


def test_scancel_ends_everything_on_all_nodes(cluster: Cluster, shared_path: Path) -> None:
    script = "(setsid sleep 300 &) ; touch up; sleep 300"
    job_id = job_id_of(
        cluster.slurmkit(shared_path, "submit", "-N", "2", "--name", "x", "--", "bash", "-c", script).stdout
    )
    wait_until((shared_path / "up").exists, "the driver starts")
    cluster.ask("scancel", job_id)
    wait_until(lambda: not is_active(cluster, job_id), "the job ends")
    assert left_on(cluster, "node1", job_id) + left_on(cluster, "node2", job_id) == []
    assert "sleep 300" not in cluster.on_node("node1", "ps", "-eo", "args").splitlines()
    assert "ended by Slurm: it was cancelled" in (shared_path / f"results/x/slurm-{job_id}.out").read_text()
    assert end_of(shared_path / "results/x") == (143, "ended by Slurm: it was cancelled", [], True)


@pytest.mark.nightly
def test_a_job_that_reaches_its_time_limit_says_so(cluster: Cluster, shared_path: Path) -> None:
    done = cluster.slurmkit(shared_path, "submit", "-N", "1", "--time", "5", "--", "bash", "-c", "touch up; sleep 300")
    job_id = job_id_of(done.stdout)
    wait_until((shared_path / "up").exists, "the driver starts")
    cluster.ask("scontrol", "update", f"JobId={job_id}", "EndTime=now+1")
    wait_until(lambda: not is_active(cluster, job_id), "the job ends", 120)
    assert end_of(shared_path / "results/bash") == (143, "ended by Slurm: it has reached its time limit", [], False)


def test_an_interrupted_wait_leaves_the_job_running(cluster: Cluster, shared_path: Path) -> None:
    waiting = subprocess.Popen(
        [SLURMKIT, "submit", "--wait", "--name", "x", "--", "sleep", "300"],
        cwd=shared_path,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout is not None
    job_id = job_id_of(waiting.stdout.readline())
    wait_until(lambda: "RUNNING" in cluster.ask("squeue", "-h", "-j", job_id, "-o", "%T"), "the job runs")
    waiting.send_signal(2)
    assert waiting.wait(30) == 130
    assert is_active(cluster, job_id)
    cluster.ask("scancel", job_id)


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_the_example_trains_across_all_nodes(cluster: Cluster, shared_path: Path, nodes: int) -> None:
    done = cluster.slurmkit(
        shared_path, "submit", "--wait", "-N", str(nodes), "--config", REPOSITORY / "examples/grpo_arithmetic.yaml",
        "grpo.max_num_steps=2", "++grpo.num_prompts_per_step=8",
        "policy.from_scratch.supervised_steps=300", "grpo.max_val_samples=16", ray=True,
    )  # fmt: skip
    run_dir = shared_path / "results/grpo_arithmetic"
    assert done.returncode == 0, done.stdout + (run_dir / "attempts/latest/driver.log").read_text()
    assert "step 2/2  reward " in done.stdout, "--wait shows the progress"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"train:reward_mean", "train:loss"} <= rows[1].keys()
    assert "val:accuracy" in rows[0]
    for left in ("step_2/manifest.json", "plots/validation_reward.png", "config.yaml", "wandb"):
        assert (run_dir / left).exists(), sorted(run_dir.rglob("*"))
    assert f"on {nodes} node" in (run_dir / f"slurm-{job_id_of(done.stdout)}.out").read_text()


def test_a_controller_that_does_not_answer_is_a_failure_and_leaves_nothing(
    cluster: Cluster, shared_path: Path, tmp_path: Path
) -> None:
    lines = Path(cluster.configuration).read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("SlurmctldPort=", "MessageTimeout="))]
    configuration = tmp_path / "slurm.conf"
    configuration.write_text("\n".join([*kept, "SlurmctldPort=9", "MessageTimeout=2", ""]))
    done = cluster.slurmkit(shared_path, "submit", "--retry-for", "1", "--", "true", SLURM_CONF=str(configuration))
    assert done.returncode == 1
    assert "Unable to contact slurm controller" in done.stderr
    assert list(shared_path.iterdir()) == []


def test_a_run_directory_that_nodes_do_not_share_is_said_to_be_the_reason(cluster: Cluster, shared_path: Path) -> None:
    # On the nodes /tmp is their own: there the job's output cannot be opened, and Slurm itself says nothing.
    with tempfile.TemporaryDirectory(dir="/tmp") as private:
        done = cluster.slurmkit(shared_path, "submit", "--wait", "--results-dir", private, "--", "true")
    assert done.returncode != 0
    assert (
        "could not open the job's output on the node: is the run directory on a file system that all nodes share?"
        in (done.stderr)
    )
