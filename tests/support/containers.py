"""A real Slurm of two nodes whose jobs run in containers, for the tests of test_runs.py and test_attach.py.

pyxis is a SPANK plugin of ours (container/spank_pyxis.c), podman is Debian's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.cluster import Cluster, development_cluster, wait_until
from tests.support.requirements import REPOSITORY, missing, need_slurm

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
        return self.cluster.slurmkit(here, "submit", *words, ray=True, **environ)

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
    source = REPOSITORY / "tests/container/spank_pyxis.c"
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


@contextmanager
def container_machines() -> Iterator[Machines]:
    """Cluster and images, gone afterwards."""
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


def wait_for(machines: Machines, path: Path, done: subprocess.CompletedProcess[str]) -> None:
    """Until the command has made the file; a job that ends without it is shown."""
    wait_until(lambda: path.exists() or is_over(machines), f"{path} or the job's end", 90)
    if not path.exists():
        run_dir = path.parent / "results/t"
        logs = [*run_dir.glob("slurm-*.out"), *run_dir.glob("attempts/latest/*.log")]
        raise AssertionError(done.stdout + done.stderr + "".join(log.read_text() for log in logs))


def is_over(machines: Machines) -> bool:
    return machines.cluster.ask("squeue", "-h") == ""
