"""Slurm through its own commands: the path that a site's filters and plugins see."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from slurmkit.errors import Failure, UserError
from slurmkit.slurm.client import JobState

# Seconds. Slurm's own MessageTimeout is 10 by default, and its commands try several times.
_DEADLINE = 120
# Where to find this Slurm, in contrast to what to run on it.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"})
# How Slurm's commands say that the controller is away, in contrast to a refusal.
_NO_ANSWER = ("Unable to contact", "Connection refused", "timed out", "configuration source", "configuration file")


def submission_environment() -> dict[str, str]:
    """The caller's environment without the variables by which sbatch or srun would change what the script says."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not name.startswith(("SBATCH_", "SLURM_", "SRUN_", "SALLOC_", "SACCT_", "SCANCEL_"))
    }


class CommandClient:
    """SlurmClient over sbatch, scontrol, sacct and scancel."""

    def __init__(self) -> None:
        if shutil.which("sbatch") is None:
            raise UserError(
                "sbatch is not on PATH: submit from a login node of a Slurm cluster, or run here without Slurm: "
                "slurmkit run"
            )

    def test(self, script: str) -> None:
        """See SlurmClient. No answer from Slurm is a Failure, as everywhere."""
        try:
            self._run("sbatch", "--test-only", input=script)
        except Failure as error:
            if any(sign in str(error) for sign in _NO_ANSWER):
                raise
            raise UserError(str(error).replace("sbatch failed", "Slurm would refuse this job: sbatch failed")) from None

    def submit(self, script: Path, environment: Mapping[str, str] = MappingProxyType({})) -> str:
        """See SlurmClient. A refusal by sbatch is a Failure that carries Slurm's own words."""
        answer = self._run("sbatch", "--parsable", str(script), environment=environment)
        job_id = answer.strip().splitlines()[-1].partition(";")[0] if answer.strip() else ""
        if not re.fullmatch(r"\d+", job_id):
            raise Failure(f"sbatch answered {answer!r} in place of a job id")
        return job_id

    def job(self, job_id: str) -> JobState | None:
        """See SlurmClient."""
        try:
            return _from_scontrol(job_id, self._run("scontrol", "--oneliner", "show", "job", job_id))
        except Failure as error:
            if "Invalid job id" not in str(error):
                raise
        fields = "JobID,State,Reason,ExitCode,NodeList"
        try:
            return _from_sacct(self._run("sacct", "-X", "-n", "-P", "-j", job_id, "-S", "1970-01-01", "-o", fields))
        except Failure as error:
            # A site without accounting remembers no job that the controller has forgotten.
            if "accounting storage is disabled" not in str(error):
                raise
            return None

    def cancel(self, job_id: str) -> None:
        """See SlurmClient."""
        self._run("scancel", job_id)

    def script_of(self, job_id: str) -> bytes:
        """See SlurmClient."""
        return self._run("scontrol", "write", "batch_script", job_id, "-").encode("utf-8", "surrogateescape")

    def keeps_environments(self) -> bool:
        """See SlurmClient."""
        return re.search(r"^AccountingStoreFlags .*job_env", self._run("scontrol", "show", "config"), re.M) is not None

    def _run(self, *command: str, input: str = "", environment: Mapping[str, str] = MappingProxyType({})) -> str:
        try:
            done = subprocess.run(
                command,
                env={**submission_environment(), **environment},
                input=input,
                capture_output=True,
                timeout=_DEADLINE,
                encoding="utf-8",
                errors="surrogateescape",
            )
        except FileNotFoundError:
            raise Failure(f"{command[0]} is not on PATH") from None
        except subprocess.TimeoutExpired:
            raise Failure(f"{command[0]} gave no answer within {_DEADLINE} s") from None
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).replace(f"{command[0]}: error: ", "")
            raise Failure(f"{command[0]} failed with exit code {done.returncode}: {said}")
        return done.stdout


def _from_scontrol(job_id: str, line: str) -> JobState:
    fields: dict[str, str] = {}
    for name, value in re.findall(r"(?:^|\s)(JobState|Reason|ExitCode|NodeList)=(\S*)", line):
        # The first of each: what comes later may stand in a path or a comment of the user's.
        fields.setdefault(name, value)
    exit_code, _, signal = fields.get("ExitCode", "0:0").partition(":")
    return JobState(
        job_id,
        fields["JobState"],
        fields.get("Reason", ""),
        int(exit_code),
        int(signal),
        fields.get("NodeList", ""),
    )


def _from_sacct(answer: str) -> JobState | None:
    if not answer.strip():
        return None
    job_id, state, reason, exit_code, nodes = answer.strip().splitlines()[-1].split("|")
    code, _, signal = exit_code.partition(":")
    return JobState(job_id, state.split()[0], reason, int(code), int(signal), nodes)
