"""What slurmkit asks of Slurm, and the plain records in which it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from slurmkit.errors import Failure

# https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES: the states that a job does not leave again.
FINAL_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
    | {"OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)


class NoAnswer(Failure):
    """The controller is away, or its answer was lost: what it was asked to do may be done, or not."""


class JobState(NamedTuple):
    """A job as Slurm sees it. Example: JobState("17", "FAILED", "NonZeroExitCode", 7, 0, "node[1-2]").

    What Slurm does not know is "" or None. Times are this machine's, as text: 2026-11-22T16:12:33.
    """

    job_id: str
    """As squeue shows it: `12`, a task of a job array `12_3`, its tasks still in the queue `12_[4-9]`."""

    state: str
    """One word of Slurm's, such as PENDING, RUNNING or CANCELLED."""

    reason: str
    """Why it waits, or how it ended: `Priority`, `JobHeldUser`, `TimeLimit`."""

    exit_code: int
    """What the batch script returned."""

    signal: int
    """The signal that ended it, or 0."""

    nodes: str
    """The nodes it has or had, such as `node[1-2]`."""

    name: str = ""
    """Accounting writes ` for each " in it."""

    comment: str = ""
    """Accounting keeps it only where slurm.conf says AccountingStoreFlags=job_comment."""

    partition: str = ""
    submitted: str | None = None
    start: str | None = None
    """When it started; of a pending job when Slurm expects it to."""

    end: str | None = None
    """When it ended; of a running job when its time limit ends it."""

    time_limit: int | None = None
    """Minutes; None is no limit."""

    restarts: int | None = None
    """How often Slurm has queued it again; None where only accounting remembers the job."""

    @property
    def is_final(self) -> bool:
        """Whether the job has ended for good."""
        return self.state in FINAL_STATES

    @property
    def code(self) -> int:
        """The exit code as a shell would show it. A job that Slurm ended without one (cancelled, timed out) has 1."""
        if self.signal:
            return 128 + self.signal
        return self.exit_code or (0 if self.state == "COMPLETED" else 1)


class JobUsage(NamedTuple):
    """What a job used up from one start to its end, or until now. Times as in JobState."""

    job_id: str
    name: str
    eligible: str | None
    """Since when nothing but other jobs kept it from starting."""

    start: str | None
    seconds: int
    nodes: int
    gpus: int
    cpu_seconds: int
    """CPUs it had, times seconds."""

    cpu_seconds_used: float | None
    """What its processes took of them; None until it has ended, and where nobody measures it."""


class Estimate(NamedTuple):
    """Where and when Slurm would start a script now. Example: Estimate("2026-11-22T16:12:33", "node[1-2]", "batch")."""

    start: str | None
    nodes: str
    partition: str


@dataclass(frozen=True, slots=True, order=True)
class Gres:
    """What one node has of a generic resource. Example: Gres("gpu", "h100", 8); the type is "" where there is none."""

    name: str
    type: str
    count: int


class Node(NamedTuple):
    """A node. Example: Node("node1", "IDLE+DRAIN", 16, 64000, (Gres("gpu", "h100", 8),), ("ib",), ("batch",))."""

    name: str
    state: str
    """Slurm's base state and flags, joined by +."""

    cpus: int
    memory: int
    """MB."""

    gres: tuple[Gres, ...]
    features: tuple[str, ...]
    """Those that a job can ask for with --constraint."""

    partitions: tuple[str, ...]


class Partition(NamedTuple):
    """A partition and what a job can get in it."""

    name: str
    is_default: bool
    state: str
    """UP, DOWN, DRAIN or INACTIVE."""

    nodes: int
    max_time: int | None
    """Minutes; None is no limit."""

    default_time: int | None
    """Minutes that a job gets without --time; None: as max_time."""

    max_nodes: int | None
    """Per job; None is no limit."""

    gres: tuple[Gres, ...]
    """Each kind that one of its nodes has, with the count per node: two entries where nodes differ."""

    cpus: tuple[int, int]
    """Per node, smallest and largest; (0, 0) without nodes."""

    memory: tuple[int, int]
    """MB per node, smallest and largest."""


class SlurmClient(Protocol):
    """One for each way to reach Slurm. Each call raises Failure where Slurm refuses, NoAnswer where it does not answer.

    A job is named as in JobState.job_id. The number of requests to the controller does not depend on a job's nodes.
    """

    def test(self, script: str) -> Estimate:
        """Ask when Slurm would start this script, without submitting it. UserError with its reason if it refuses."""
        ...

    def submit(self, script: Path, environment: Mapping[str, str] = {}) -> str:
        """Submit the file as it is, free of the caller's SBATCH_* and SLURM_*. Returns the job id.

        `environment` is added to that of sbatch, which the job inherits: secrets travel there and nowhere else.
        NoAnswer where the job may be in the queue all the same.
        """
        ...

    def jobs_of(self, script: Path) -> tuple[JobState, ...]:
        """The caller's jobs that the controller has, ended ones too, whose batch script was submitted as this file."""
        ...

    def job(self, job_id: str) -> JobState | None:
        """The job's state, from the controller or from accounting; None where neither remembers it.

        Of a whole array (`12`) it is that of one task: one that has not ended, else one that failed, else any.
        """
        ...

    def jobs(self, job_ids: Sequence[str] = (), *, user: str = "") -> tuple[JobState, ...]:
        """Many at once: these jobs, as `job` finds them, without those forgotten; or all that the controller has of
        a user, also those that ended within MinJobAge (5 minutes by default). One row per line of squeue.
        """
        ...

    def accounting(self, job_ids: Sequence[str]) -> tuple[JobState, ...]:
        """What slurmdbd recorded of these jobs, forgotten ones too; empty on a site without accounting."""
        ...

    def usage(self, job_ids: Sequence[str]) -> tuple[JobUsage, ...]:
        """What accounting has of each start of these jobs, oldest first; empty on a site without accounting."""
        ...

    def cancel(self, job_id: str) -> None:
        """End the job. One that has ended already, or that Slurm has forgotten, is no error."""
        ...

    def signal(self, job_id: str, name: str) -> None:
        """Send a signal, such as "USR2", to the batch script of a running job, which passes on what it wants to.

        Failure where it does not run.
        """
        ...

    def requeue(self, job_id: str) -> None:
        """End the job's attempt and put it back into the queue."""
        ...

    def hold(self, job_id: str) -> None:
        """Keep a pending job from starting until it is released."""
        ...

    def release(self, job_id: str) -> None:
        """Let a held job start."""
        ...

    def partitions(self) -> tuple[Partition, ...]:
        """All partitions by name, hidden ones too."""
        ...

    def nodes(self) -> tuple[Node, ...]:
        """All nodes by name that belong to a partition."""
        ...

    def script_of(self, job_id: str) -> bytes:
        """The batch script as Slurm stored it, in the controller or in accounting (AccountingStoreFlags=job_script)."""
        ...

    def keeps_environments(self) -> bool:
        """Whether this cluster's accounting stores the environment of every job."""
        ...
