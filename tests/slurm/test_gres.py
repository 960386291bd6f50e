"""What Slurm can be asked for, on a real Slurm whose nodes differ, and what Ray then registers on each node.

node1  16 CPUs, 8 h100              features ib and big
node2   8 CPUs, 4 h100 and 4 2080ti  feature ib
node3  12 CPUs, 4 h100 and 4 2080ti
node4   4 CPUs, 4 h100 of 4 shards each
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurmkit.job.render import render
from slurmkit.job.spec import DIRECTIVES, JobSpec
from tests.support.cluster import Cluster, development_cluster, wait_until

pytestmark = pytest.mark.slurm

NODES = """
GresTypes=gpu,shard
DefMemPerCPU=1000
TopologyPlugin=topology/tree
NodeName=node1 CPUs=16 CoresPerSocket=16 RealMemory=64000 Gres=gpu:h100:8 Feature=ib,big
NodeName=node2 CPUs=8 CoresPerSocket=8 RealMemory=32000 Gres=gpu:h100:4,gpu:2080ti:4 Feature=ib
NodeName=node3 CPUs=12 CoresPerSocket=12 RealMemory=32000 Gres=gpu:h100:4,gpu:2080ti:4
NodeName=node4 CPUs=4 CoresPerSocket=4 RealMemory=16000 Gres=gpu:h100:4,shard:16
"""
TOPOLOGY = "SwitchName=leaf1 Nodes=node[1-2]\nSwitchName=leaf2 Nodes=node[3-4]\nSwitchName=top Switches=leaf[1-2]\n"
GRES = """
NodeName=node1 Name=gpu Type=h100 File=STATE/dev/nvidia[0-7]
NodeName=node[2-3] Name=gpu Type=h100 File=STATE/dev/nvidia[0-3]
NodeName=node[2-3] Name=gpu Type=2080ti File=STATE/dev/nvidia[4-7]
NodeName=node4 Name=gpu Type=h100 File=STATE/dev/nvidia[0-3]
NodeName=node4 Name=shard Count=16
"""
# As any driver would: what Ray has on each node, and the devices (0 to 3 are h100) that a task with a node's GPUs gets.
SEEN = """
import json, os, sys
import ray
ray.init(log_to_driver=False)
seen = {"nodes": {n["NodeManagerHostname"]: [n["Resources"]["CPU"], n["Resources"].get("GPU", 0)] for n in ray.nodes()}}
if sys.argv[1:]:
    @ray.remote(num_cpus=0, num_gpus=int(sys.argv[1]))
    def devices():
        return sorted(["h100", "2080ti"][int(device) // 4] for device in os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    seen["devices"] = ray.get(devices.remote())
print(json.dumps(seen))
"""
# Ray's own processes must not mind these signals: some of Slurm's ways to signal a step reach every process of it.
TRAPS = """
for process in /proc/[0-9]*; do
  pid=${process#/proc/}
  case $(<"$process/comm") in raylet | gcs_server) kill -USR1 "$pid"; kill -USR2 "$pid" ;; esac
done 2>/dev/null
trap 'echo "saved after $((++n))"; sleep 1; echo "ended after $n"; exit 0' USR2
touch "up.$1"
for i in {1..1500}; do sleep 0.1; done
exit 9
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    name = f"mixed{os.getpid() % 10**7}"
    folder = tmp_path_factory.mktemp("site")
    (folder / "gres.conf").write_text(GRES.replace("STATE", f"/run/slurmkit-{name}"))
    (folder / "topology.conf").write_text(TOPOLOGY)
    (folder / "site.conf").write_text(NODES)
    site = ["--conf", folder / "site.conf", "--etc", folder / "gres.conf", "--etc", folder / "topology.conf"]
    with development_cluster(name, "--nodes", "4", *site) as found:
        yield found


FORMS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "typed GPUs on whole nodes of different sizes": (
        {"gres": "gpu:h100:4", "nodes": "2", "exclusive": "true", "nodelist": "node[1,4]"},
        {"nodes": {"node1": [16, 4], "node4": [4, 4]}},
    ),
    "two types on each node": (
        {"gres": "gpu:h100:2,gpu:2080ti:2", "nodes": "2", "cpus_per_task": "2"},
        {"nodes": {"node2": [2, 4], "node3": [2, 4]}, "devices": ["2080ti", "2080ti", "h100", "h100"]},
    ),
    "--gpus, unevenly over two nodes": (
        {"gpus": "9", "nodes": "2", "nodelist": "node[1-2]"},
        {"nodes": {"node1": [1, 8], "node2": [1, 1]}},
    ),
    "typed --gpus-per-node with CPUs for each": (
        {"gpus_per_node": "2080ti:3", "cpus_per_gpu": "2", "mem_per_gpu": "500", "nodelist": "node3"},
        {"nodes": {"node3": [6, 3]}, "devices": ["2080ti"] * 3},
    ),
    "shards of one GPU": ({"gres": "shard:3"}, {"nodes": {"node4": [1, 1]}, "devices": ["h100"]}),
    "none": ({"nodelist": "node3"}, {"nodes": {"node3": [1, 0]}}),
}


@dataclass(frozen=True)
class Runs:
    """All jobs of this file, submitted at once and ended: as many beside each other as the nodes hold."""

    folder: Path
    jobs: dict[str, str]

    def of(self, name: str) -> Path:
        return self.folder / "results" / name

    def last(self, name: str) -> object:
        log = self.of(name) / "attempts/latest/driver.log"
        try:
            return json.loads(log.read_text().splitlines()[-1])
        except (OSError, IndexError, ValueError):
            outputs = [path.read_text() for path in self.of(name).glob("*.out")]
            pytest.fail(f"{name}: {outputs}")


@pytest.fixture(scope="module")
def runs(mixed: Cluster) -> Iterator[Runs]:
    folder = Path(tempfile.mkdtemp(prefix="slurmkit gres ", dir="/var/tmp"))
    (folder / "seen.py").write_text(SEEN)
    (folder / "traps.sh").write_text(TRAPS)
    jobs: dict[str, str] = {}

    def submit(name: str, keys: dict[str, str], *command: str) -> None:
        keys = {"ray.object_store_memory": "80000000", "mem_per_cpu": "100", "env.OMP_NUM_THREADS": "1", **keys}
        if "mem_per_gpu" in keys:
            del keys["mem_per_cpu"]
        words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        done = mixed.slurmkit(folder, "submit", "--name", name, *words, "--", *command, ray=name.startswith("form"))
        assert done.returncode == 0, f"{name}: {done.stderr}"
        jobs[name] = re.findall(r"^job +(\d+)$", done.stdout, re.MULTILINE)[0]

    try:
        submit("signal", {"signal": "B:USR2@70", "time": "2", "nodelist": "node3"}, "bash", "traps.sh", "signal")
        submit("scancel", {"nodelist": "node3"}, "bash", "traps.sh", "scancel")
        for number, (keys, expected) in enumerate(FORMS.values()):
            devices = expected.get("devices", [])
            assert isinstance(devices, list)
            submit(f"form{number}", keys, "python", "seen.py", *([str(len(devices))] if devices else []))
        show = 'echo "$SLURM_ARRAY_TASK_ID $RAY_ADDRESS"; [[ $SLURM_ARRAY_TASK_ID == 1 ]] || exit 3'
        submit("array", {"array": "1-2", "nodelist": "node3"}, "bash", "-c", show)
        wait_until((folder / "up.scancel").exists, "the driver of scancel starts", 120)
        mixed.ask("scancel", "--signal=USR2", jobs["scancel"])
        wait_until(lambda: not mixed.ask("squeue", "-h").strip(), "all jobs end", 200)
        yield Runs(folder, jobs)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("form", FORMS)
def test_ray_registers_on_each_node_what_slurm_gave_there(form: str, runs: Runs) -> None:
    assert runs.last(f"form{list(FORMS).index(form)}") == FORMS[form][1]


@pytest.mark.parametrize("name", ["signal", "scancel"])
def test_the_command_receives_a_signal_once_and_its_exit_code_is_the_job_s(
    name: str, runs: Runs, mixed: Cluster
) -> None:
    log = (runs.of(name) / "attempts/latest/driver.log").read_text()
    assert log.splitlines() == ["saved after 1", "ended after 1"], next(runs.of(name).glob("*.out")).read_text()
    assert mixed.ended(runs.jobs[name]) == "COMPLETED|0:0"


def test_each_task_of_an_array_has_its_own_folder_ray_output_and_exit_code(runs: Runs, mixed: Cluster) -> None:
    first = runs.jobs["array"]
    attempts = [path for path in (runs.of("array") / "attempts").iterdir() if path.name != "latest"]
    said = sorted((path / "driver.log").read_text().split() for path in attempts)
    assert [task for task, _ in said] == ["1", "2"]
    assert said[0][1] != said[1][1], "two Rays"
    assert {path.name for path in runs.of("array").glob("*.out")} == {f"slurm-{first}_1.out", f"slurm-{first}_2.out"}
    assert [mixed.ended(f"{first}_{task}") for task in (1, 2)] == ["COMPLETED|0:0", "FAILED|3:0"]


# For each key of JobSpec that becomes a directive, every form of it that this cluster can serve.
ACCEPTED: dict[str, list[object]] = {
    "name": ["a.b+c-1_2"],
    "nodes": [1, 4],
    "time": ["30", "1:30", "4:00:00", "0-12", "0-12:30:05"],
    "time_min": ["10"],
    "partition": ["batch", "high", "high,batch"],
    "account": ["root"],
    "qos": ["normal"],
    "reservation": ["maintenance"],
    "constraint": ["ib", "ib&big", "ib|big", "[ib|big]"],
    "prefer": ["big"],
    "nodelist": ["node[2-3]", "node[1,4]"],
    "exclude": ["node1", "node[1-2],node4"],
    "exclusive": [True, "user", "mcs"],
    "gres": ["gpu", "gpu:8", "gpu:h100:8", "gpu:2080ti:1", "gpu:h100", "gpu:h100:4,gpu:2080ti:4", "shard:4", "shard"],
    "gpus": ["2", "8", "16", "h100:6,2080ti:2"],
    "gpus_per_node": ["8", "h100:8", "h100:2,2080ti:2"],
    "cpus_per_task": [12],
    "cpus_per_gpu": [2],
    "mem": ["1G", "0", "4096", "16000M"],
    "mem_per_cpu": ["100M"],
    "mem_per_gpu": ["2G"],
    "switches": ["1", "1@2:00"],
    "dependency": ["singleton", "afterany:1?afterok:1"],
    "array": ["0-7%2", "1,5,9", "0-20:5"],
    "signal": ["USR2", "B:USR2@300", "R:USR1@60", "10@60"],
    "requeue": [True, False],
    "mail_type": ["END,FAIL", "ALL"],
    "mail_user": ["me@example.org"],
    "comment": ['a "b" \\ # c é'],
}
TOGETHER: dict[str, dict[str, object]] = {
    "time_min": {"time": "60"},
    "gpus": {"nodes": 2},
    "cpus_per_gpu": {"gpus_per_node": "2"},
    "mem_per_gpu": {"gpus_per_node": "2"},
    "switches": {"nodes": 2},
    "nodelist": {"nodes": 2},
}


def job(**keys: object) -> str:
    minimal = {"name": "t", "python": "python3", "workdir": "/", "run_dir": "/r", "command": ["true"]}
    return render(JobSpec.model_validate({**minimal, "mem_per_cpu": "10", **keys}))


def refused(cluster: Cluster, script: str) -> str | None:
    done = subprocess.run(
        ["sbatch", "--test-only"], input=script, env=cluster.environment, capture_output=True, text=True, timeout=60
    )
    return None if done.returncode == 0 else done.stderr


def test_a_drafted_site_file_holds_a_gpu_type_that_begins_with_a_digit(mixed: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    assert mixed.slurmkit(tmp_path, "site", "init", "--out", site).returncode == 0
    text = site.read_text()
    assert "gres: gpu:2080ti:4" in text
    site.write_text(text.replace("# defaults:", "defaults:"))
    linted = mixed.slurmkit(tmp_path, "site", "lint", site)
    assert linted.returncode == 0, linted.stderr


def test_this_slurm_accepts_every_directive_that_a_job_can_have(mixed: Cluster) -> None:
    assert sorted(ACCEPTED) == sorted(DIRECTIVES), "a new key needs a line above"
    answers: dict[str, str | None] = {}
    for key, values in sorted(ACCEPTED.items(), key=lambda item: item[0] == "reservation"):
        if key == "reservation":  # the last, for it takes a node from the others
            words = "users=root starttime=now duration=9 nodes=node4 flags=ignore_jobs"
            mixed.ask("scontrol", "create", "reservation", "reservation=maintenance", *words.split())
        for value in values:
            keys = {"mem_per_cpu": None} if key in ("mem", "mem_per_gpu") else {}
            answers[f"{key}={value}"] = refused(mixed, job(**{**keys, **TOGETHER.get(key, {}), key: value}))
    answers["sbatch="] = refused(mixed, job(sbatch={"nice": "5", "spread-job": True, "hold": False}))
    mixed.ask("scontrol", "delete", "reservation=maintenance")
    assert {what: said for what, said in answers.items() if said is not None} == {}
    assert refused(mixed, job(gres="gpu:h100:9")), "and what no node has is refused"
