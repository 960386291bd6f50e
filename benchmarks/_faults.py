"""Parts of the programs of this folder: a development cluster, faults that it can have, and a run that is watched."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
DEVCLUSTER = REPOSITORY / "scripts" / "devcluster"
SLURMKIT = Path(sys.executable).with_name("slurmkit")

SAVE_PERIOD = 5
# Small enough for two cores to start in seconds. Nothing here may change what two runs of it compute.
TINY = (
    "env.arithmetic.num_terms=2",
    "policy.from_scratch.hidden_size=32",
    "policy.from_scratch.num_attention_heads=2",
    "policy.from_scratch.num_key_value_heads=2",
    "policy.from_scratch.intermediate_size=64",
    "policy.from_scratch.supervised_steps=150",
    "grpo.num_prompts_per_step=8",
    "grpo.num_generations_per_prompt=8",
    "grpo.max_val_samples=20",
    "policy.train_micro_batch_size=64",
    f"checkpointing.save_period={SAVE_PERIOD}",
    "logger.wandb_enabled=false",
)


class Cluster:
    """A development cluster as its operator has it: every machine's processes and own folders, seen from outside."""

    def __init__(self, name: str, nodes: int) -> None:
        self.name, self.nodes = name, [f"node{n}" for n in range(1, nodes + 1)]
        self.state = Path(f"/run/slurmkit-{name}")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RAY_"))}
        self.environment["SLURM_CONF"] = str(self.state / "etc/slurm.conf")

    def slurm(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's own commands prints; nothing where it fails and `check` is False."""
        done = subprocess.run(command, env=self.environment, check=check, capture_output=True, text=True, timeout=120)
        return done.stdout.strip()

    def expand(self, nodes: str) -> list[str]:
        """node[1-2] as names, the batch script's node first."""
        return self.slurm("scontrol", "show", "hostnames", nodes).split()

    def init(self, machine: str) -> int:
        """Process 1 of a machine, as the host numbers it."""
        return int((self.state / "machines" / machine / "pid").read_text().split()[0])

    def processes(self, machine: str) -> dict[int, str]:
        """Command line of every process of a machine, by the host's number; none where it is down."""
        found = {}
        try:
            space = os.readlink(f"/proc/{self.init(machine)}/ns/pid")
        except OSError:
            return {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == space:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if words:  # a zombie has none
                        found[int(pid)] = words.strip()
            except OSError:
                continue  # it has ended
        return found

    def files(self, machine: str) -> set[str]:
        """What lies in a machine's own /tmp and /dev/shm."""
        root = Path(f"/proc/{self.init(machine)}/root")
        return {f"{folder}/{path.name}" for folder in ("/tmp", "/dev/shm") for path in (root / folder[1:]).iterdir()}

    def kill(self, machine: str, pattern: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Signal the processes of a machine whose command line begins with `pattern`; how many there were."""
        victims = [pid for pid, words in self.processes(machine).items() if re.match(pattern, words)]
        for pid in victims:
            os.kill(pid, number)
        return len(victims)

    def start_daemon(self, machine: str, daemon: str) -> None:
        """Start slurmd or slurmctld again, as `devcluster up` does."""
        script = 'source "$1/machines.sh"; STATE=$2; start_daemon "$3" "$4" "$4" -D'
        words = [f"{DEVCLUSTER}.d", str(self.state), machine, daemon]
        subprocess.run(["bash", "-euo", "pipefail", "-c", script, "bash", *words], check=True, timeout=60)

    def unplug(self, machine: str, state: str) -> None:
        """Set the switch's port of a machine down or up: as a pulled cable does, it leaves the node's routes alone."""
        port = f"port{machine.removeprefix('node')}"
        enter = ["nsenter", "--target", str(self.init("controller")), "--net", "ip", "link", "set", port, state]
        subprocess.run(enter, check=True, timeout=60)

    def devcluster(self, command: str, *words: str | Path) -> None:
        done = subprocess.run([DEVCLUSTER, command, "--name", self.name, *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"devcluster {command} failed: {done.stdout}{done.stderr}")


def shared_folders() -> list[Path]:
    """Return what lies in /tmp and jobs need: of /tmp, a node sees only its own, and what is shared with it."""
    needed = dict.fromkeys([REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)])
    return [path for path in needed if path.is_relative_to("/tmp")]


def check_environment() -> None:
    """Exit with a message if the environment of this Python lacks a program that the jobs need."""
    for program in (SLURMKIT, SLURMKIT.with_name("ray")):
        if not program.exists():
            sys.exit(
                f"error: there is no {program}. Start this program with the Python of an environment that holds "
                "slurmkit and ray (sudo needs its full path, such as sudo .venv/bin/python)."
            )


@contextmanager
def cluster_of(nodes: int, kind: str) -> Iterator[Cluster]:
    """Start a cluster of its own. It is removed afterwards, also if this program gets SIGTERM."""
    check_environment()
    cluster = Cluster(f"{kind}{os.getpid()}", nodes)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    shared = [word for path in shared_folders() for word in ("--shared", path)]
    cluster.devcluster("up", "--nodes", str(nodes), *shared)
    try:
        yield cluster
    finally:
        cluster.devcluster("down")


@dataclass(frozen=True)
class Fault:
    """`kind` happens to the run's `place`-th node, `seconds` after an attempt has saved ("step") or begun ("start")."""

    kind: str
    place: int
    after: str
    seconds: float
    lasts: float = 0.0


# Seconds that a fault lasts, of those that do. Some end before anybody need notice, some do not.
LASTS = {"slurmd": (2, 30), "node": (10, 30), "slurmctld": (2, 25), "network": (2, 30)}
KINDS = ("driver", "raylet", "slurmd", "node", "slurmctld", "network")
# The first words of the processes that are killed, on the machine where they run.
_VICTIMS = {
    "driver": r"\S*python\S* -m slurmkit\.grpo ",
    "raylet": r"\S*/raylet ",
    "rank": r"ray::PolicyWorker",
    "slurmd": r"\S*slurmd -D",
    "slurmctld": r"\S*slurmctld -D",
}


def schedule(seed: int, within: float = 25.0) -> Iterator[Fault]:
    """Yield faults without end, all kinds equally often, at most `within` seconds after a saved step.

    One in four falls into a bring-up, but never two in a row: a run that gets nowhere three times gives up. `seed` and
    `within` alone decide the faults.
    """
    rng = random.Random(f"faults {seed}")
    after = "step"
    while True:
        for kind in rng.sample(KINDS, len(KINDS)):
            starting, during, training = rng.random() < 0.25, rng.uniform(0, 15), rng.uniform(0, within)
            after = "start" if starting and after == "step" else "step"
            seconds = during if after == "start" else training
            place, lasts = rng.randrange(2), rng.uniform(*LASTS.get(kind, (0, 0)))
            yield Fault(kind, place, after, round(seconds, 1), round(lasts, 1))


def inflict(cluster: Cluster, fault: Fault, nodes: list[str]) -> tuple[str, Callable[[], None] | None]:
    """Do it now. The machine it is done to, "" where there was nothing to kill, and what ends it where it lasts."""
    machine = {"driver": nodes[0], "slurmctld": "controller"}.get(fault.kind, nodes[fault.place % len(nodes)])
    if fault.kind == "node":
        cluster.devcluster("kill-node", machine)
        return machine, lambda: cluster.devcluster("start-node", machine)
    if fault.kind == "network":
        cluster.unplug(machine, "down")
        return machine, lambda: cluster.unplug(machine, "up")
    if fault.kind == "hang":
        return machine if cluster.kill(machine, _VICTIMS["rank"], signal.SIGSTOP) else "", None
    if not cluster.kill(machine, _VICTIMS[fault.kind]):
        return "", None
    if fault.kind in ("slurmd", "slurmctld"):
        return machine, lambda: cluster.start_daemon(machine, fault.kind)
    return machine, None


@dataclass
class Attempt:
    """One attempt of a run, as its files and Slurm tell of it. Times are seconds since the epoch."""

    folder: Path
    start: dict[str, Any]
    started: float
    steps: dict[int, float] = field(default_factory=dict)  # step: when it was seen
    noticed: float | None = None
    ended: float | None = None
    end: dict[str, Any] | None = None  # None: still running, or lost
    state: str = ""  # Slurm's word for how it ended

    @property
    def name(self) -> str:
        return self.folder.name

    def saved(self, since: float = 0.0) -> float | None:
        """When it had certainly saved a checkpoint after `since`: a run that does not, three times, gives up."""
        seen = sorted(moment for moment in self.steps.values() if moment > since)
        enough = SAVE_PERIOD + 2  # step 0 is no step, and a step's line precedes its save
        return seen[enough - 1] if len(seen) >= enough else None

    @property
    def job_id(self) -> str:
        return str(self.start["job_id"])

    @property
    def reason(self) -> str:
        """How it ended, in words."""
        return str(self.end["reason"]) if self.end else f"lost: the job ended as {self.state}" if self.ended else ""


class Run:
    """A run directory that is watched: `look` often, and read `attempts`."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cluster, self.path = cluster, path
        self.attempts: list[Attempt] = []
        self._asked = 0.0

    def submit(self, *words: str | Path) -> str:
        """Into the queue, by slurmkit as its user calls it; the job's id."""
        command: list[str | Path] = [SLURMKIT, "submit", "--name", self.path.name, "--results-dir", self.path.parent]
        ray = ["--set", "ray.num_cpus=1", "--set", "ray.object_store_memory=100000000"]
        done = subprocess.run(
            [*command, *ray, "--nodes", "2", "--config", REPOSITORY / "examples/grpo_arithmetic.yaml", *TINY, *words],
            cwd=self.path.parent,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        found = re.search(r"^job +(\d+)", done.stdout, re.MULTILINE)
        if done.returncode or found is None:
            raise RuntimeError(f"slurmkit submit ended with {done.returncode}: {done.stdout}{done.stderr}")
        return found[1]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def live(self) -> Attempt | None:
        """The newest attempt, while it runs."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].ended is None else None

    @property
    def is_over(self) -> bool:
        """Whether the newest attempt has said that nothing comes after it."""
        return bool(self.attempts and self.attempts[-1].end and not self.attempts[-1].end["goes_on"])

    def look(self) -> None:
        """Take in what is new since the last time."""
        known = {attempt.name for attempt in self.attempts}
        for path in sorted(self.path.glob("attempts/[0-9]*/start.json"), key=lambda path: path.stat().st_mtime):
            if path.parent.name not in known and path.parent.name != "latest":
                self.attempts.append(Attempt(path.parent, json.loads(path.read_text()), path.stat().st_mtime))
        for attempt in self.attempts[-2:]:
            self._read(attempt)
        live = self.live
        if live is not None and time.monotonic() - self._asked > 2:
            self._asked = time.monotonic()
            state = self._state(live.job_id)
            if state and state not in ("RUNNING", "COMPLETING", "PENDING", "CONFIGURING"):
                self._read(live)
                if live.ended is None:  # the batch shell was killed before it could say anything
                    live.noticed = live.noticed or time.time()
                    live.ended, live.state = time.time(), state

    def _state(self, job_id: str) -> str:
        """Slurm's word for how a job is; nothing while slurmctld is away."""
        asked = ["squeue", "-h", "-t", "all", "-o", "%T", "-j", job_id]
        return self.cluster.slurm("timeout", "3", *asked, check=False)

    def _read(self, attempt: Attempt) -> None:
        now = time.time()
        try:
            log = (attempt.folder / "driver.log").read_text(errors="replace")
        except OSError:
            log = ""
        for step in re.findall(r"^step (\d+)/\d+ .*\n", log, re.MULTILINE):
            attempt.steps.setdefault(int(step), now)
        if attempt.noticed is None:
            told = [*attempt.folder.glob("bringup/failed.*"), attempt.folder / "bringup/exit_code"]
            times = [path.stat().st_mtime for path in told if path.exists()]
            attempt.noticed = min(times, default=None)
        end = attempt.folder / "end.json"
        if attempt.end is None and end.exists():
            attempt.end, attempt.ended = json.loads(end.read_text()), end.stat().st_mtime
            attempt.noticed = min(attempt.noticed or attempt.ended, attempt.ended)


@dataclass(frozen=True)
class Effect:
    """What came of a fault, in seconds after it; None where the attempt went on, or nothing came after it."""

    noticed: float | None = None
    ended: float | None = None
    training: float | None = None
    steps_lost: int | None = None
    reason: str = "the attempt went on"


def effect(run: Run, hit: Attempt, at: float) -> Effect:
    """Of a fault `at` that moment, which ended the attempt `hit`."""
    assert hit.noticed is not None
    assert hit.ended is not None
    place = run.attempts.index(hit)
    after = next((attempt for attempt in run.attempts[place + 1 :] if attempt.steps), None)
    training = lost = None
    if after is not None:
        training = min(after.steps.values()) - at
        lost = max(hit.steps) - max(min(after.steps) - 1, 0) if hit.steps else 0
    return Effect(hit.noticed - at, hit.ended - at, training, lost, hit.reason)


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be equal in two runs of one configuration."""
    of_machine = ("time:", "perf:", "train:peak_memory_gib")
    return [{k: v for k, v in line.items() if not k.startswith(of_machine)} for line in metrics]


def snapshot(cluster: Cluster) -> dict[str, tuple[Counter[str], set[str]]]:
    """Processes and own files of every node."""
    return {node: (Counter(cluster.processes(node).values()), cluster.files(node)) for node in cluster.nodes}
