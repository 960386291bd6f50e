"""Where a job leaves traces on a development cluster, each kind under its name."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import Cluster
from tests.support.requirements import REPOSITORY
from tests.support.secret_search import Canaries, Hit, hits_in_files, labels_in

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Traces:
    """Of one job on a cluster of two nodes, since a moment (seconds since the epoch)."""

    cluster: Cluster
    job_id: str
    since: float
    attempt: Path

    @property
    def machines(self) -> list[str]:
        return ["controller", "node1", "node2"]

    @property
    def state(self) -> Path:
        """Of the cluster: Slurm's configuration, logs and what its daemons store."""
        return Path(self.cluster.configuration).parents[1]

    def in_files(self, canaries: Canaries) -> Iterator[Hit]:
        """Everything written on this machine, and on each machine's own disks."""
        shared = ["/var", "/etc", "/run", "/tmp", "/dev/shm", str(Path.home()), str(REPOSITORY)]
        yield from hits_in_files(shared, self.since, canaries)
        own = ["/tmp", "/dev/shm", str(self.state / "local")]
        for machine in self.machines:
            answer = self.cluster.on_node(
                machine,
                *(sys.executable, str(_HERE / "secret_search.py"), str(self.since), *own),
                input=json.dumps(dict(canaries)),
            )
            yield from ((f"{machine}:{path}", label) for path, label in json.loads(answer))

    def in_slurm(self, canaries: Canaries) -> Iterator[Hit]:
        """Every answer that Slurm gives about the job."""
        answers = {
            "scontrol show job": ("scontrol", "-dd", "show", "job", self.job_id),
            "scontrol show step": ("scontrol", "show", "step"),
            "stored script": ("scontrol", "write", "batch_script", self.job_id, "-"),
            "squeue": ("squeue", "--states=all", "--jobs", self.job_id, "-o", "%all"),
            "sacct": ("sacct", "--jobs", self.job_id, "--parsable2", "-o", "ALL"),
            "sacct script": ("sacct", "--jobs", self.job_id, "--batch-script"),
            "sacct environment": ("sacct", "--jobs", self.job_id, "--env-vars"),
        }
        for name, command in answers.items():
            text = self.cluster.ask(*command)
            assert text.strip(), f"{name} says nothing"
            yield from ((name, label) for label in labels_in(text.encode(), canaries))

    def in_processes(self, canaries: Canaries) -> Iterator[Hit]:
        """The command line of every process, on this machine and on each of the cluster's."""
        for machine in ["here", *self.machines]:
            command = ["ps", "-ww", "-eo", "args"]
            here = machine == "here"
            text = subprocess.check_output(command, text=True) if here else self.cluster.on_node(machine, *command)
            assert "slurm" in text
            yield from ((f"ps on {machine}", label) for label in labels_in(text.encode(), canaries))

    def ray(self) -> dict[str, bytes]:
        """All that the running Ray tells: name of the source -> its answer."""
        meet = self.attempt / "bringup"
        environment = [f"RAY_ADDRESS={(meet / 'head').read_text().strip()}", "RAY_AUTH_MODE=token"]
        environment += [f"RAY_AUTH_TOKEN_PATH={meet / 'token'}"]
        program = [sys.executable, str(_HERE / "ray_state.py")]
        answer = json.loads(self.cluster.on_node("node1", "env", *environment, *program))
        return {name: base64.b64decode(data) for name, data in answer.items()}

    def in_ray(self, canaries: Canaries) -> Iterator[Hit]:
        """What Ray's state API would show."""
        for name, data in self.ray().items():
            yield from ((f"Ray's {name}", label) for label in labels_in(data, canaries))

    def everywhere(self, canaries: Canaries, *, running: bool) -> set[Hit]:
        """All hits, Ray's too while it runs."""
        hits = {*self.in_files(canaries), *self.in_slurm(canaries), *self.in_processes(canaries)}
        return hits | set(self.in_ray(canaries)) if running else hits
