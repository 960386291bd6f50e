"""Jobs inside containers on a real Slurm of two nodes: what is seen inside, how they end, and what they leave.

pyxis is a SPANK plugin of ours (spank_pyxis.c), podman is Debian's, apptainer is a stand-in that checks its arguments.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurmkit.job.container import missing_parts
from slurmkit.job.spec import JobSpec
from tests.support.containers import Machines, is_over, wait_for, wait_until

# Runs on every node inside the container: each line is a fact.
FACTS = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
tries() { if : 2>/dev/null >"$1"; then echo written; else echo refused; fi; }
{
  say image "$(cat /in-the-image)"
  say pwd "$PWD"
  say data "$(cat /data/file)"
  say readonly "$(tries /data/new)"
  say writable "$(tries /rw/new."$SLURMD_NODENAME")"
  say root "$(tries /new)"
  say temporary "$(tries "$TMPDIR/new")"
  say home "$(ls "$REAL_HOME" 2>/dev/null | tr '\n' ' ')"
  say homeless "$(tries "$HOME/new")"
  say hidden "$(ls "$HIDDEN" 2>/dev/null)"
  say contested "$CONTESTED"
  say odd "$(printf %s "$ODD" | od -An -tx1 | tr -d ' \n')"
  say pyxis "${PYXIS_CONTAINER_IMAGE-none}"
  say umask "$(umask)"
  say shm "$(df --output=size -k /dev/shm | tail -n 1 | tr -d ' ')"
} >"$SK_ATTEMPT_DIR/facts.$SLURMD_NODENAME"
"""
COUNT = """
import os, ray, sys, time
ray.init(log_to_driver=False)
gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
print("nodes", len(gpus), "gpus", sum(gpus), "image", open("/in-the-image").read().strip())
open("up", "w")
while not os.path.exists("go"):
    time.sleep(0.1)
sys.exit(7)
"""
ODD = 'it\'s $HOME\n`id` "é" \\ end'


@pytest.fixture
def here(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see; with a space in its name, except where pyxis could not carry that."""
    words = request.node.name.partition("[")[2].rstrip("]") + request.node.originalname
    path = Path(tempfile.mkdtemp(prefix="slurmkit-test-" if "pyxis" in words else "slurmkit test ", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("runtime", ["pyxis", "podman"])
def test_ray_and_the_command_run_inside_the_container_on_two_nodes(
    machines: Machines, here: Path, runtime: str
) -> None:
    for name in ("data", "rw", "home", "hidden"):
        (here / name).mkdir()
        (here / name / "file").write_text(f"{name}\n")
    work = here / "work"
    work.mkdir()
    (work / "count.py").write_text(COUNT)
    (work / "facts.sh").write_text(FACTS)
    job = {
        "nodes": 2,
        "setup": ["bash facts.sh"],
        "env": {"CONTESTED": "job", "ODD": ODD, "REAL_HOME": str(here / "home"), "HIDDEN": str(here / "hidden")},
        # There is no driver for podman's CDI here; what it is asked for then is seen in test_container.py.
        **({"gres": "gpu:h100:4"} if runtime == "pyxis" else {}),
        "container": machines.container(runtime, mounts=[f"{here}/data:/data:ro", f"{here}/rw:/rw"]),
    }
    environ = {"HOME": str(here / "home"), "PYXIS_CONTAINER_IMAGE": "/nowhere"}
    done = machines.submit(work, job, "job.yaml", "--", "python", "count.py", **environ)
    wait_for(machines, work / "up", done)
    commands = [machines.cluster.on_node(node, "sh", "-c", "cat /proc/*/cmdline") for node in ("node1", "node2")]
    assert all("ray" in text and "`id`" not in text for text in commands), "no value stands in a command line"
    (work / "go").touch()
    wait_until(lambda: is_over(machines), "the job ends", 90)
    attempt = work / "results/t/attempts/latest"
    gpus = 8 if runtime == "pyxis" else 0
    assert (attempt / "driver.log").read_text().splitlines()[-1] == f"nodes 2 gpus {gpus} image inside"
    for node in ("node1", "node2"):
        assert dict(line.split("=", 1) for line in (attempt / f"facts.{node}").read_text().splitlines()) == {
            "image": "inside",
            "pwd": str(work),
            "data": "data",
            "readonly": "refused",
            "writable": "written",
            "root": "refused",
            "temporary": "written",
            "home": "",
            "homeless": "written",
            "hidden": "",
            "contested": "job",
            "odd": ODD.encode().hex(),
            "pyxis": "none",
            "umask": "0077",
            "shm": str(4 << 20),
        }
    job_id = json.loads((work / "results/t/run.json").read_text())["attempts"][0]["job_id"]
    assert " ExitCode=7:0 " in machines.cluster.ask("scontrol", "-o", "show", "job", job_id)
    assert machines.left() == []


@pytest.mark.parametrize("runtime", ["pyxis", "podman"])
def test_scancel_ends_what_runs_inside_and_leaves_nothing(machines: Machines, here: Path, runtime: str) -> None:
    job = {"container": machines.container(runtime)}
    script = "(setsid sleep 300 &) ; touch up; sleep 300"
    done = machines.submit(here, job, "job.yaml", "--", "bash", "-c", script)
    wait_for(machines, here / "up", done)
    machines.cluster.ask("scancel", "--name", "t")
    wait_until(lambda: is_over(machines), "the job ends", 90)
    wait_until(lambda: machines.left() == [], "nothing is left", 30)
    assert "ended by Slurm" in next((here / "results/t").glob("slurm-*.out")).read_text()


def test_no_process_of_podman_outlives_a_step_that_slurm_kills(machines: Machines, here: Path) -> None:
    # Its monitor and its containers are no children of the step, but they are in the step's cgroup.
    job = {"nodelist": "node1", "container": machines.container("podman")}
    job["setup"] = ["(setsid sleep 300 &)", "touch up", "sleep 300"]
    done = machines.submit(here, job, "job.yaml", "--", "true")
    wait_for(machines, here / "up", done)
    machines.cluster.ask("scancel", "--name", "t", "--signal", "KILL")
    wait_until(lambda: is_over(machines), "the job ends", 90)
    wait_until(
        lambda: not [line for line in machines.left() if "sleep" in line or "conmon" in line], "all are dead", 30
    )
    # What nothing could clean up after that: a folder, and podman's record of the container.
    store = " ".join(f"{name}={value}" for name, value in machines.podman_env.items())
    machines.cluster.on_node("node1", "sh", "-c", f"rm -rf /tmp/sk-*; {store} podman rm --all --force")
    assert machines.left() == []


@pytest.mark.parametrize("runtime", ["pyxis", "podman"])
def test_what_the_section_turns_on_is_seen_inside(machines: Machines, here: Path, runtime: str) -> None:
    home = here / "home"
    home.mkdir()
    (home / "file").write_text("x")
    keys = {"mount_home": True, "writable": True, "workdir": "/etc"}
    job = {"container": machines.container(runtime, **keys)}
    line = 'echo "fact $(ls "$HOME") $PWD $(touch /new && ls -d /new /in-the-image | tr "\\n" " ")"'
    assert machines.stopped_in_setup(here, job, line, HOME=str(home)) == "fact file /etc /in-the-image /new \n"
    assert not (machines.folder / "root/new").exists(), "the image itself stays as it is"
    assert machines.left() == []


def test_a_named_pyxis_container_is_reused_with_the_mounts_of_the_new_job(machines: Machines, here: Path) -> None:
    facts = []
    for number in ("1", "2"):
        (here / number).mkdir()
        container = machines.container("pyxis", name="kept", writable=True, mounts=[f"{here / number}:/number"])
        job = {"nodelist": "node1", "container": container}
        line = 'echo $SLURM_JOB_ID >>/kept; touch /number/here; echo "fact $(wc -l </kept)"'
        facts.append(machines.stopped_in_setup(here, job, line))
        assert (here / number / "here").exists()
    assert facts == ["fact 1\n", "fact 2\n"]
    assert machines.cluster.on_node("node1", "sh", "-c", "ls /tmp/enroot") == "pyxis_kept\n"


@pytest.mark.parametrize("runtime", ["pyxis", "podman"])
def test_a_container_that_cannot_start_exits_75_and_logs_the_runtime_error(
    machines: Machines, here: Path, runtime: str
) -> None:
    (here / "broken").write_text("no image")
    job = {"container": {"runtime": runtime, "image": str(here / "broken"), "check": []}}
    done = machines.submit(here, job, "--wait", "job.yaml", "--", "true")
    assert done.returncode == 75
    output = next((here / "results/t").glob("slurm-*.out")).read_text()
    assert "the container did not start on node" in output
    assert {"pyxis": "cannot unpack", "podman": "Error: "}[runtime] in output
    assert machines.left() == []


def test_podman_runs_an_image_by_its_name_without_its_entrypoint(machines: Machines, here: Path) -> None:
    # What a pull leaves in a node's store, which needs no registry here.
    podman = ["env", *(f"{name}={value}" for name, value in machines.podman_env.items()), "podman"]
    change = ["--change", 'ENTRYPOINT ["/bin/false"]', "--change", "ENV CONTESTED=image"]
    for node in ("node1", "node2"):
        machines.cluster.on_node(node, *podman, "import", *change, str(machines.folder / "root.tar"), "slurmkit-test")
    container = {**machines.container("podman"), "image": "localhost/slurmkit-test"}
    job = {"env": {"CONTESTED": "job"}, "container": container}
    assert machines.stopped_in_setup(here, job, 'echo "fact $(</in-the-image) $CONTESTED"') == "fact inside job\n"
    assert machines.left() == []


APPTAINER = r"""#!/bin/bash
# Stands in for Apptainer: knows the options that its manual page knows, and sets the environment as it does.
set -euo pipefail
printf '%s\0' "$@" >"$SK_ATTEMPT_DIR/argv"
[[ $1 == exec ]]; shift
while [[ $1 == -* ]]; do
  case $1 in
    --bind=/*:/*) IFS=: read -r source _ mode <<<"${1#*=}"; [[ -e $source && $mode =~ ^(|ro)$ ]] ;;
    --pwd=/*) cd "${1#*=}" ;;
    --no-eval | --nv | --writable-tmpfs | --no-mount=home,cwd | --no-mount=cwd) ;;
    *) echo "unknown option $1" >&2; exit 255 ;;
  esac
  shift
done
[[ -e $1 ]]; shift
export PATH=/usr/bin:/bin CONTESTED=image LD_LIBRARY_PATH=/.singularity.d/libs
for name in "${!APPTAINERENV_@}"; do
  export "${name#APPTAINERENV_}=${!name}"
  unset "$name"
done
exec "$@"
"""


def test_apptainer_is_given_what_it_knows_and_runs_ray_and_the_command(machines: Machines, here: Path) -> None:
    (here / "bin").mkdir()
    stand_in = here / "bin/apptainer"
    stand_in.write_text(APPTAINER)
    stand_in.chmod(0o755)
    (here / "a b.sif").touch()
    container = {"runtime": "apptainer", "image": str(here / "a b.sif"), "mounts": [f"{here}/bin:/data:ro"]}
    job = {"gres": "gpu:h100:2", "env": {"CONTESTED": "job", "ODD": ODD}, "container": container}
    script = 'printf "%s|" "$CONTESTED" "$ODD" "$LD_LIBRARY_PATH"; env | grep -c ^APPTAINERENV; exit 3'
    path = f"{here}/bin:{os.environ['PATH']}"
    done = machines.submit(here, job, "--wait", "job.yaml", "--", "bash", "-c", script, PATH=path)
    attempt = here / "results/t/attempts/latest"
    assert done.returncode == 3, done.stdout + done.stderr
    assert (attempt / "driver.log").read_text() == f"job|{ODD}|/.singularity.d/libs|0\n"
    argv = (attempt / "argv").read_text().split("\0")
    assert argv[: argv.index("bash")] == [
        "exec",
        "--no-eval",
        "--no-mount=home,cwd",
        f"--pwd={here}",
        "--nv",
        f"--bind={here}/bin:/data:ro",
        "--bind=/tmp:/tmp",
        f"--bind={here}:{here}",
        f"--bind={here}/results/t:{here}/results/t",
        f"{here}/a b.sif",
    ]
    assert machines.left() == []


def test_a_host_whose_srun_does_not_know_pyxis_is_found_before_the_queue(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"name": "t", "python": "python3", "workdir": "/w", "run_dir": "/r", "command": ["true"]}
    spec = JobSpec.model_validate({**keys, "container": machines.container("pyxis")})
    monkeypatch.setenv("SLURM_CONF", machines.cluster.configuration)
    assert missing_parts(spec) == []
    shutil.copy(machines.cluster.configuration, tmp_path)  # and not plugstack.conf, which lies beside it
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert missing_parts(spec) == [
        (
            "container.runtime",
            "pyxis: srun on this host has no --container-image; if compute nodes have it, take runtime out of "
            "container.check",
        )
    ]
