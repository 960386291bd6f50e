"""Slurm through its own commands: the path that a site's filters and plugins see."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from slurmkit.errors import Failure, SlurmkitError, UserError
from slurmkit.slurm import parse
from slurmkit.slurm.client import Estimate, JobState, JobUsage, NoAnswer, Node, Partition

# Seconds. Slurm's own MessageTimeout is 10 by default, and its commands try several times.
DEADLINE = 120
# Where to find this Slurm, in contrast to what to run on it.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"})
_CHANGING = ("SBATCH_", "SLURM_", "SRUN_", "SALLOC_", "SACCT_", "SCANCEL_", "SQUEUE_", "SINFO_", "SCONTROL_", "PYXIS_")
# Where to find a process of this machine's, which a job's nodes cannot reach or find gone: W&B's, in a notebook.
_OF_THIS_MACHINE = frozenset({"WANDB_SERVICE"})
# Variables that change how bash reads a script, and functions that replace commands in it. `module` is often one.
_OF_BASH = re.compile(
    r"BASH_FUNC_(?!(?:module|ml|_module_raw)\W+$).*|BASH_ENV|BASHOPTS|SHELLOPTS|CDPATH|GLOBIGNORE|POSIXLY_CORRECT",
    re.DOTALL,
)
# How Slurm's commands say that the controller is away, in contrast to a refusal (src/common/slurm_errno.c).
_NO_ANSWER = (
    *("Unable to contact", "Connection refused", "Connection reset", "timed out", "standby mode", "Zero Bytes were"),
    *("ommunication connection failure", "essage send failure", "essage receive failure", "Transport endpoint is not"),
)
# Output of sbatch --test-only. Not every release names the nodes and the partition.
_ESTIMATE = r"to start at (\d\S+)(?: using \d+ processors?)?(?: on (?:nodes? )?(\S+))?(?: in partition (\S+))?"
_NO_SLURM = ("configuration source", "configuration file")


def active_jobs() -> set[str] | None:
    """Ids of the caller's jobs that have not ended; None where Slurm is not here, or does not say."""
    try:
        jobs = CommandClient().jobs(user=pwd.getpwuid(os.getuid()).pw_name)
    except (SlurmkitError, KeyError):
        return None
    return {re.split(r"[_+]", job.job_id)[0] for job in jobs if not job.is_final}


def submission_environment() -> dict[str, str]:
    """Return the caller's environment as a job may inherit it.

    Leaves out variables that are options of Slurm's commands, change how bash reads a script, belong to the run that
    this process is a part of, or are of no use on another machine.
    """
    return {
        name: value
        for name, value in without_outer_run(os.environ).items()
        if name in _KEPT
        or not (
            name in _OF_THIS_MACHINE
            or name.startswith(_CHANGING)
            or _OF_BASH.fullmatch(name)
            or (name == "TMPDIR" and value.startswith("/tmp/sk-"))
        )
    }


def without_outer_run(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that a run of slurmkit gives to its command, and without its Ray."""
    prefixes = ("SK_", "RAY_") if "SK_ATTEMPT_DIR" in environ else ("SK_",)
    return {name: value for name, value in environ.items() if not name.startswith(prefixes)}


def release() -> tuple[int, int]:
    """The release of Slurm that is installed here, such as (22, 5)."""
    said = _decoded(_run("sbatch", "--version").stdout)
    found = re.search(r"(\d+)\.(\d+)", said)
    if not found:
        raise Failure(f"sbatch --version answered {said!r}")
    return int(found[1]), int(found[2])


def has_pyxis() -> bool:
    """Return True if srun has pyxis's options here."""
    return b"--container-image" in _run("srun", "--help").stdout


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts node2 before node10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def hostnames(nodes: str) -> list[str]:
    """The names in Slurm's text for several nodes, such as node[1-2]; no question to the controller."""
    return _decoded(_run("scontrol", "show", "hostnames", nodes).stdout).split()


class CommandClient:
    """SlurmClient over sbatch, squeue, sacct, sinfo, scontrol and scancel."""

    def __init__(self) -> None:
        if shutil.which("sbatch") is None:
            raise UserError(
                "sbatch is not on PATH: submit from a login node of a Slurm cluster, or run here without Slurm: "
                "slurmkit run"
            )

    def test(self, script: str) -> Estimate:
        """See SlurmClient. No answer from Slurm is a Failure, as everywhere."""
        try:
            done = _run("sbatch", "--test-only", input=_encoded(script))
        except Failure as error:
            if isinstance(error, NoAnswer) or any(sign in str(error) for sign in _NO_SLURM):
                raise
            raise UserError(str(error).replace("sbatch failed", "Slurm would refuse this job: sbatch failed")) from None
        said = _decoded(done.stderr)
        found = re.search(_ESTIMATE, said)
        return Estimate(found[1], found[2] or "", found[3] or "") if found else Estimate(None, "", "")

    def submit(self, script: Path, environment: Mapping[str, str] = MappingProxyType({})) -> str:
        """See SlurmClient. A refusal by sbatch is a Failure that carries Slurm's own words."""
        answer = _decoded(_run("sbatch", "--parsable", str(script), environment=environment).stdout)
        job_id = answer.strip().splitlines()[-1].partition(";")[0] if answer.strip() else ""
        if not re.fullmatch(r"\d+", job_id):
            raise NoAnswer(f"sbatch answered {answer!r} in place of a job id")
        return job_id

    def jobs_of(self, script: Path) -> tuple[JobState, ...]:
        """See SlurmClient."""
        # The path may have been spelled otherwise; only of a like one is the file system asked.
        fields, path = (*parse.QUEUE_FIELDS, "Command"), os.path.realpath(script)
        table = _table("squeue", fields, "--states=all", "--user", str(os.getuid()))
        return in_order(
            parse.job_from(row)
            for *row, command in table
            if os.path.basename(command) == script.name and os.path.realpath(command) == path
        )

    def job(self, job_id: str) -> JobState | None:
        """See SlurmClient."""
        return first_of(self.jobs([job_id]))

    def jobs(self, job_ids: Sequence[str] = (), *, user: str = "") -> tuple[JobState, ...]:
        """See SlurmClient."""
        if user:
            return self._queue("--user", str(user_id(user)))
        if not job_ids:
            return ()
        try:
            found = self._queue("--jobs", ",".join(map(_asked, job_ids)))
        except Failure as error:
            # squeue says so of one job alone; of several it leaves out those that the controller has forgotten.
            if "Invalid job id specified" not in str(error):
                raise
            found = ()
        return in_order((*found, *self.accounting(forgotten(job_ids, found))))

    def accounting(self, job_ids: Sequence[str]) -> tuple[JobState, ...]:
        """See SlurmClient."""
        return in_order(map(parse.job_from, self._book(parse.BOOK_FIELDS, job_ids, "--allocations")))

    def usage(self, job_ids: Sequence[str]) -> tuple[JobUsage, ...]:
        """See SlurmClient."""
        # Without its steps sacct does not know what CPU time a job took.
        found = map(parse.usage_from, self._book(parse.USAGE_FIELDS, job_ids, "--duplicates"))
        return tuple(sorted((each for each in found if "." not in each.job_id), key=lambda each: each.start or "~"))

    def cancel(self, job_id: str) -> None:
        """See SlurmClient."""
        _run("scancel", _checked(job_id))

    def signal(self, job_id: str, name: str) -> None:
        """See SlurmClient."""
        # To a job that does not run scancel tries for a minute and a half.
        if not any(job.state == "RUNNING" for job in self.jobs([job_id])):
            raise Failure(f"job {job_id} does not run: there is nobody to hear {name}")
        _run("scancel", "--batch", "--state=RUNNING", f"--signal={name}", _checked(job_id))

    def requeue(self, job_id: str) -> None:
        """See SlurmClient."""
        _run("scontrol", "requeue", _checked(job_id))

    def hold(self, job_id: str) -> None:
        """See SlurmClient."""
        _run("scontrol", "hold", _checked(job_id))

    def release(self, job_id: str) -> None:
        """See SlurmClient."""
        _run("scontrol", "release", _checked(job_id))

    def partitions(self) -> tuple[Partition, ...]:
        """See SlurmClient."""
        answer = _decoded(_run("scontrol", "--all", "--oneliner", "show", "partition").stdout)
        return parse.partitions_from(answer, self.nodes())

    def nodes(self) -> tuple[Node, ...]:
        """See SlurmClient."""
        return parse.nodes_from(_table("sinfo", parse.NODE_FIELDS, "--all", "--Node"))

    def script_of(self, job_id: str) -> bytes:
        """See SlurmClient. Of a job that the controller has forgotten: as accounting stored it, where it does."""
        # scontrol says only in words that it found none.
        script = _run("scontrol", "write", "batch_script", _checked(job_id), "-").stdout
        if not script:
            try:
                # A title, a line of dashes, the script and a line break.
                script = _run("sacct", "--jobs", job_id, "--batch-script").stdout.partition(b"-\n")[2][:-1]
            except Failure:
                script = b""
        if not script.startswith(b"#!"):
            raise Failure(f"Slurm has no script of job {job_id}, neither in the controller nor in accounting")
        return script

    def keeps_environments(self) -> bool:
        """See SlurmClient."""
        configuration = _decoded(_run("scontrol", "show", "config").stdout)
        return re.search(r"^AccountingStoreFlags .*job_env", configuration, re.MULTILINE) is not None

    def _book(self, fields: Sequence[str], job_ids: Sequence[str], option: str) -> Iterator[list[str]]:
        if not job_ids:
            return iter(())
        try:
            return _table(
                "sacct", fields, option, "--starttime", "1970-01-01", "--jobs", ",".join(map(_asked, job_ids))
            )
        except Failure as error:
            if "accounting storage is disabled" not in str(error):
                raise
            return iter(())

    def _queue(self, *which: str) -> tuple[JobState, ...]:
        return in_order(map(parse.job_from, _table("squeue", parse.QUEUE_FIELDS, "--states=all", *which)))


def first_of(jobs: Sequence[JobState]) -> JobState | None:
    """The one that speaks for all tasks of an array."""
    return min(jobs, key=lambda job: (job.is_final, job.code == 0), default=None)


def in_order(jobs: Iterable[JobState]) -> tuple[JobState, ...]:
    """By the numbers in their ids."""
    return tuple(sorted(jobs, key=lambda job: [int(number) for number in re.findall(r"\d+", job.job_id)]))


def forgotten(job_ids: Sequence[str], found: Sequence[JobState]) -> list[str]:
    """Those of which nothing was found, be it a task of an array or a part of a heterogeneous job."""
    known = {name for job in found for name in (job.job_id, re.split(r"[_+]", job.job_id)[0])}
    return [job_id for job_id in job_ids if _asked(job_id) not in known]


def user_id(user: str) -> int:
    """Failure for an unknown name, of which squeue would list no jobs."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise Failure(f"this machine knows no user {user!r}") from None


def _asked(job_id: str) -> str:
    # squeue and sacct take no list of tasks: of 12_[4-9] they are asked about all of 12.
    return _checked(job_id).partition("_[")[0]


def _checked(job_id: str) -> str:
    if not re.fullmatch(r"\d+(_\d+|_\[[^]\s]+\]|\+\d+)?", job_id, re.ASCII):
        raise UserError(f"{job_id!r} is not the id of a job, such as 12 or 12_3")
    return job_id


def _table(command: str, fields: Sequence[str], *options: str) -> Iterator[list[str]]:
    # No value of another user's can hold what nobody could foresee.
    mark = f"\x1f{os.urandom(8).hex()}\x1f"
    if command == "sacct":
        form: tuple[str, ...] = ("--parsable", f"--delimiter={mark}", f"--format={','.join(fields)}")
    else:
        form = (f"--Format={','.join(f'{field}:{mark}' for field in fields)}",)
    return parse.rows(_decoded(_run(command, "--noheader", *form, *options).stdout), mark, len(fields))


def _run(
    *command: str, input: bytes = b"", environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(
            command,
            env={**submission_environment(), **environment},
            input=input,
            capture_output=True,
            timeout=DEADLINE,
        )
    except FileNotFoundError:
        raise Failure(f"{command[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} gave no answer within {DEADLINE} s") from None
    if done.returncode < 0:
        raise NoAnswer(f"{command[0]} was ended by signal {-done.returncode}")
    if done.returncode != 0:
        said = _decoded(done.stderr.strip() or done.stdout.strip()).replace(f"{command[0]}: error: ", "")
        kind = NoAnswer if any(sign in said for sign in _NO_ANSWER) else Failure
        raise kind(f"{command[0]} failed with exit code {done.returncode}: {said}")
    return done


def _decoded(answer: bytes) -> str:
    return answer.decode("utf-8", "surrogateescape")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
