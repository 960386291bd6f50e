"""A settled job into the queue: exactly once, recorded in the run directory, and checked against what Slurm stored."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurmkit.errors import Failure, UserError
from slurmkit.job.audit import digest_of
from slurmkit.job.keeper_file import keeper_text, name_of_keeper
from slurmkit.job.render import digest_of_spec
from slurmkit.job.settle import Settled
from slurmkit.run.directory import RunDirectory, files_of, jobs_of
from slurmkit.run.patience import Patience
from slurmkit.run.preflight import look
from slurmkit.slurm.client import Estimate, JobState, NoAnswer, SlurmClient

# Seconds between two looks at a waiting job; how long Slurm may have forgotten it, and how long it may give no answer,
# before that is an error.
_POLL = 2.0
_FORGOTTEN = 60.0
_AWAY = 1800.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A job that nothing speaks against, as far as can be known before it is submitted."""

    directory: RunDirectory
    warnings: tuple[str, ...]
    estimate: Estimate
    secrets: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job in the queue."""

    job_id: str
    script: Path
    run_dir: Path
    ready: Ready

    @property
    def output(self) -> Path:
        """The job's own output."""
        return self.run_dir / f"slurm-{self.job_id}.out"


def submit(
    settled: Settled, script: str, client: SlurmClient, patience: Patience, provenance: Mapping[str, Any] = {}
) -> Submitted:
    """Write the run directory, submit, compare, record. A refused submission leaves nothing behind.

    `provenance` is recorded with the attempt.
    """
    spec = settled.spec
    ready = check(settled, script, client, patience)
    directory = ready.directory
    os.umask(int(spec.umask, 8))  # sbatch hands it on, so that the job's own output is made with it, too
    known = jobs_of(directory.path)
    directory.prepare({"job.sbatch": script, **keeper_for(script, directory.path), **files_of(settled)})
    path = directory.path / "job.sbatch"
    try:
        job_id = _submit_once(client, path, ready.secrets, known, patience)
    except BaseException:
        directory.undo()
        raise
    site = None if settled.site is None else {"file": str(settled.site), "sha256": digest_of(settled.site)}
    attempt = {"job_id": job_id, "spec": f"sha256:{digest_of_spec(spec)}", "site": site, **provenance}
    directory.add_attempt(settled.identity, attempt)
    try:
        stored = patience.ask(lambda: client.script_of(job_id))
    except Failure as error:
        raise Failure(
            f"job {job_id} was submitted, but its script cannot be read back to be compared: {error}"
        ) from None
    if stored != script.encode():
        client.cancel(job_id)
        raise Failure(f"the script that Slurm stored for job {job_id} differs from {path}; the job was cancelled")
    return Submitted(job_id, path, directory.path, ready)


def _submit_once(
    client: SlurmClient, script: Path, secrets: Mapping[str, str], known: Collection[str], patience: Patience
) -> str:
    """The id of the one job, be it registered by a try whose answer was lost. `known`: earlier jobs of the run."""

    def registered() -> list[str]:
        # A follow-up that an earlier job queued and cancelled may have left no trace in the run directory.
        found = (job.job_id for job in client.jobs_of(script) if job.state != "CANCELLED")
        return sorted({re.split(r"[_+]", job_id)[0] for job_id in found}.difference(known), key=int)

    unclear = False
    while True:
        began = time.monotonic()
        try:
            job_id = client.submit(script, secrets)
            break
        except KeyboardInterrupt:
            with suppress(Failure):
                for late in registered():
                    client.cancel(late)
            raise
        except Failure as error:
            if not (unclear or isinstance(error, NoAnswer)):
                raise
            unclear, spent = True, time.monotonic() - began
            try:
                if isinstance(error, NoAnswer):
                    # A controller that stood still takes in what reached it meanwhile when it goes on.
                    patience.wait(error, spent)
                jobs = patience.ask(registered)
            except Failure as away:
                raise Failure(
                    f"{away}\nwhether sbatch's last try put the job into the queue is not known: before submitting "
                    f"again, look whether squeue --me shows a job of {script}"
                ) from None
            if jobs:
                job_id = jobs[0]
                break
            if not isinstance(error, NoAnswer):
                raise
    with suppress(Failure):
        for late in registered() if unclear else ():
            if late != job_id:  # another try, which the controller took in after all
                client.cancel(late)
    return job_id


def check(settled: Settled, script: str, client: SlurmClient, patience: Patience) -> Ready:
    """What can be known before a submission, changing nothing. UserError lists all that speaks against it."""
    directory = RunDirectory(Path(settled.spec.run_dir))
    found = look(settled)
    problems = [remark.text for remark in found if remark.is_problem]
    try:
        keeper_for(script, directory.path)
    except UserError as error:
        problems.append(str(error))
    try:
        _refuse_in_use(directory, settled, client, patience)
    except UserError as error:
        problems.append(str(error))
    try:
        estimate = patience.ask(lambda: client.test(script))
    except UserError as error:
        problems.append(str(error))
    try:
        # Nobody types a passphrase for a job that is refused anyway.
        if not problems or all(source.command is None for source in settled.spec.secrets.values()):
            secrets = settled.read_secrets()
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return Ready(directory, tuple(remark.text for remark in found), estimate, secrets)


def keeper_for(script: str, run_dir: Path) -> dict[str, str]:
    """The keeper that a rendered file expects in its run directory, by name; none where a site's templates have none.

    UserError where the file was rendered with the keeper of another slurmkit, which is not there.
    """
    expected = re.search(r"/(keeper-[0-9a-f]{12}\.py)", script)
    if expected is None or (run_dir / expected[1]).exists():
        return {}
    if expected[1] != name_of_keeper():
        raise UserError(
            f"the file was rendered with another slurmkit's {expected[1]}, which watches over the job, and this one "
            f"has {name_of_keeper()}: render it again, or put that file into {run_dir}"
        )
    return {expected[1]: keeper_text()}


def _refuse_in_use(directory: RunDirectory, settled: Settled, client: SlurmClient, patience: Patience) -> None:
    """A name belongs to one run, and a run to one job at a time, which may be a follow-up that no command submitted."""
    directory.refuse_other(settled)
    jobs = patience.ask(lambda: client.jobs_of(directory.path / "job.sbatch")) if directory.attempts else ()
    for job in jobs:
        if not job.is_final:
            raise UserError(
                f"{directory.path} belongs to job {job.job_id}, which is {job.state}; two jobs would write over "
                f"each other: wait for it, cancel it (scancel {job.job_id}), or give this run another --name"
            )


def wait(client: SlurmClient, job_id: str, tell: Callable[[JobState], None], meanwhile: Callable[[], None]) -> JobState:
    """Wait until the job has ended for good. `tell` hears of each change of state, `meanwhile` is called in between."""
    last: tuple[str, str] | None = None
    seen = answered = time.monotonic()
    while True:
        try:
            job = client.job(job_id)
            answered = time.monotonic()
        except NoAnswer:
            if time.monotonic() - answered > _AWAY:
                raise
            meanwhile()
            time.sleep(_POLL)
            seen = time.monotonic()
            continue
        if job is not None:
            seen = time.monotonic()
            if (job.state, job.nodes) != last:
                last = (job.state, job.nodes)
                tell(job)
            if job.is_final:
                return job
        elif time.monotonic() - seen > _FORGOTTEN:
            raise Failure(f"Slurm knows no job {job_id} any more, and has no record of how it ended")
        meanwhile()
        time.sleep(_POLL)
