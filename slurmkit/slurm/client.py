"""What slurmkit asks of Slurm, and the plain records in which it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES: the states that a job does not leave again.
FINAL_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
    | {"OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as Slurm sees it now. Example: JobState("17", "FAILED", "NonZeroExitCode", 7, 0, "node[1-2]")."""

    job_id: str
    state: str
    reason: str
    exit_code: int
    """What the batch script returned."""

    signal: int
    """The signal that ended it, or 0."""

    nodes: str

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


class SlurmClient(Protocol):
    """One implementation per way to reach Slurm. Each call raises Failure when Slurm does not answer."""

    def test(self, script: str) -> None:
        """Ask whether Slurm would take this script, without submitting it. UserError with its reason if not."""
        ...

    def submit(self, script: Path) -> str:
        """Submit the file as it is, free of the caller's SBATCH_* and SLURM_*. Returns the job id."""
        ...

    def job(self, job_id: str) -> JobState | None:
        """The job's state, from the controller or from accounting; None where neither remembers it."""
        ...

    def cancel(self, job_id: str) -> None:
        """End the job."""
        ...

    def script_of(self, job_id: str) -> bytes:
        """The batch script as Slurm stored it."""
        ...
