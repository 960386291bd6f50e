"""Jobs inside containers on a real Slurm of two nodes: what is seen inside, how they end, and what they leave.

pyxis is a SPANK plugin of ours (spank_pyxis.c), podman is Debian's, apptainer is a stand-in that checks its arguments.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cluster, development_cluster
from parts import REPOSITORY, missing, need_slurm

from slurmkit.job.container import missing_parts
from slurmkit.job.spec import JobSpec

# What Python needs beside /usr, wherever this test's own environment keeps it.
_PYTHON = sorted(
    {
        path
        for path in (*sys.path, sys.prefix, sys.base_prefix, str(REPOSITORY))
        if os.path.isdir(path) and path != "/usr"
    }
)
# The same by names that pyxis can carry: a checkout may lie in a folder with a space in its name.
ALIASES = {f"alias{number}": path for number, path in enumerate(_PYTHON)}
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


@dataclass(frozen=True)
class Machines:
    """A cluster of two nodes with pyxis and podman on it, and an image in each one's form."""

    cluster: Cluster
    folder: Path

    def container(self, runtime: str, **keys: Any) -> dict[str, Any]:
        image = self.folder / ("root.sqsh" if runtime == "pyxis" else "root")
        if runtime == "pyxis":
            mounts = [f"{self.folder}/{alias}:/{alias}:ro" for alias in ALIASES]
        else:
            mounts = [f"{path}:{path}:ro" for path in ("/usr", *_PYTHON)]
        return {"runtime": runtime, "image": str(image), **keys, "mounts": mounts + list(keys.get("mounts", []))}

    @property
    def podman_env(self) -> dict[str, str]:
        """On these nodes only /tmp is a node's own; elsewhere all of them would share one store."""
        return {
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
        }

    def submit(self, here: Path, job: dict[str, Any], *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        job = {"name": "t", "python": sys.executable, **job, "env": {**self.podman_env, **job.get("env", {})}}
        (here / "job.yaml").write_text(yaml.safe_dump(job, allow_unicode=True))
        return self.cluster.slurmkit(here, "submit", *words, **environ)

    def stopped_in_setup(self, here: Path, job: dict[str, Any], line: str, **environ: str) -> str:
        """What a shell line says after `fact` on the first node, in a job that ends before Ray starts."""
        done = self.submit(here, {**job, "setup": [line, "exit 1"]}, "--wait", "job.yaml", "--", "true", **environ)
        assert done.returncode == 75, done.stdout + done.stderr
        log = (here / "results/t/attempts/latest/node-node1.log").read_text()
        return "".join(line for line in log.splitlines(keepends=True) if line.startswith("fact "))

    def left(self) -> list[str]:
        """What jobs have left on the nodes: processes, Ray's folders, containers."""
        found: list[str] = []
        for node in ("node1", "node2"):
            processes = self.cluster.on_node(node, "ps", "-eo", "args").splitlines()
            found += [line for line in processes if any(word in line for word in ("raylet", "conmon", "sleep 300"))]
            found += self.cluster.on_node(node, "sh", "-c", "ls -d /tmp/sk-* /tmp/enroot/*.* 2>/dev/null").splitlines()
            podman = ["env", *(f"{name}={value}" for name, value in self.podman_env.items()), "podman", "ps", "-aq"]
            found += self.cluster.on_node(node, *podman).splitlines()
        return found


def build_pyxis(folder: Path) -> Path:
    if shutil.which("gcc") is None or not Path("/usr/include/slurm/spank.h").exists():
        missing("gcc or Slurm's spank.h is not installed (scripts/test installs both as root on Debian)")
    library = folder / "pyxis.so"
    source = Path(__file__).with_name("spank_pyxis.c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def make_image(root: Path) -> None:
    """A root file system whose /usr is this machine's, mounted by the site (pyxis) or the job (podman)."""
    for name in ("usr", "etc", "proc", "sys", "dev", "tmp", "run", "root", "var/tmp"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/environment").write_text("PATH=/usr/bin:/bin\nCONTESTED=image\n")
    (root / "in-the-image").write_text("inside\n")


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    need_slurm()
    if shutil.which("podman") is None:
        missing("podman is not installed (scripts/test installs it as root on Debian)")
    folder = Path(tempfile.mkdtemp(prefix="slurmkit-container-", dir="/var/tmp"))
    try:
        make_image(folder / "root")
        shutil.copytree(folder / "root", folder / "with-aliases", symlinks=True)
        for alias, path in ALIASES.items():
            (folder / alias).symlink_to(path)
            inside = folder / "with-aliases" / path.lstrip("/")
            if not any(parent.is_symlink() for parent in inside.parents):  # else it lies in one that is there
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.symlink_to(f"/{alias}")
        for image, root in (("root.tar", "root"), ("root.sqsh", "with-aliases")):
            subprocess.run(["tar", "-cf", folder / image, "-C", folder / root, "."], check=True)
        (folder / "storage.conf").write_text(
            '[storage]\ndriver = "overlay"\ngraphroot = "/tmp/podman/graph"\nrunroot = "/tmp/podman/run"\n'
        )
        (folder / "containers.conf").write_text('[engine]\ntmp_dir = "/tmp/podman/tmp"\nevents_logger = "none"\n')
        (folder / "plugstack.conf").write_text(f"required {build_pyxis(folder)} data=/tmp/enroot userland=/usr\n")
        with development_cluster(f"ct{os.getpid()}", "--nodes", "2", "--etc", folder / "plugstack.conf") as cluster:
            for node in ("node1", "node2"):
                # crun 1.8 refuses a cgroup v2 beside v1 that has controllers, as this kernel's may; /run is the host's.
                unified = "/sys/fs/cgroup/unified"
                hide = f"! grep -qs . {unified}/cgroup.controllers || mount -t tmpfs tmpfs {unified}"
                own = "mkdir -p /run/crun && mount -t tmpfs tmpfs /run/crun"
                cluster.on_node(node, "sh", "-c", f"{hide}; {own}")
            yield Machines(cluster, folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def here(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see; with a space in its name, except where pyxis could not carry that."""
    words = request.node.name.partition("[")[2].rstrip("]") + request.node.originalname
    path = Path(tempfile.mkdtemp(prefix="slurmkit-test-" if "pyxis" in words else "slurmkit test ", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def wait_for(machines: Machines, path: Path, done: subprocess.CompletedProcess[str]) -> None:
    """Until the command has made the file; a job that ends without it is shown."""
    wait_until(lambda: path.exists() or is_over(machines), f"{path} or the job's end")
    if not path.exists():
        run_dir = path.parent / "results/t"
        logs = [*run_dir.glob("slurm-*.out"), *run_dir.glob("attempts/latest/*.log")]
        raise AssertionError(done.stdout + done.stderr + "".join(log.read_text() for log in logs))


def is_over(machines: Machines) -> bool:
    return machines.cluster.ask("squeue", "-h") == ""


@pytest.mark.parametrize("runtime", ["pyxis", "podman"])
def test_on_two_nodes_ray_and_the_command_run_inside_and_see_the_image_the_mounts_and_the_job_s_environment(
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
    wait_until(lambda: is_over(machines), "the job ends")
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
    wait_until(lambda: is_over(machines), "the job ends")
    wait_until(lambda: machines.left() == [], "nothing is left", 30)
    assert "ended by Slurm" in next((here / "results/t").glob("slurm-*.out")).read_text()


def test_no_process_of_podman_outlives_a_step_that_slurm_kills(machines: Machines, here: Path) -> None:
    # Its monitor and its containers are no children of the step, but they are in the step's cgroup.
    job = {"nodelist": "node1", "container": machines.container("podman")}
    job["setup"] = ["(setsid sleep 300 &)", "touch up", "sleep 300"]
    done = machines.submit(here, job, "job.yaml", "--", "true")
    wait_for(machines, here / "up", done)
    machines.cluster.ask("scancel", "--name", "t", "--signal", "KILL")
    wait_until(lambda: is_over(machines), "the job ends")
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


def test_a_named_pyxis_container_of_an_earlier_job_is_used_again_with_this_job_s_mounts(
    machines: Machines, here: Path
) -> None:
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
def test_a_container_that_cannot_start_ends_the_job_with_75_and_the_runtime_s_own_words(
    machines: Machines, here: Path, runtime: str
) -> None:
    (here / "broken").write_text("no image")
    job = {"container": {"runtime": runtime, "image": str(here / "broken"), "check": []}}
    done = machines.submit(here, job, "--wait", "job.yaml", "--", "true")
    assert done.returncode == 75
    output = next((here / "results/t").glob("slurm-*.out")).read_text()
    assert "the command did not finish: a node failed" in output
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
