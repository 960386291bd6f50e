"""The next attempt: it waits in the queue from this one's start, and goes on where this one ends."""

import os
import re
import subprocess
import threading
import time
from contextlib import suppress
from typing import List, Optional, Tuple

from slurmkit.keeper.meeting import NO_ANSWER, Meeting, ask, attempt_to_ask, tell, text_of, write

# Seconds for which an ended attempt waits for a slurmctld that gives no answer, and between two questions to it.
PATIENCE, PAUSE = 300.0, 5.0


class FollowUp:
    """The next attempt: it waits in the queue from this one's start, and goes on where this one ends."""

    def __init__(self, meeting: Meeting, queues: bool = True) -> None:
        self._meeting = meeting
        self._script = os.path.join(meeting.run, "job.sbatch")
        self._job = os.environ["SLURM_JOB_ID"]
        self._is_wanted = True
        self._queued = ""
        self._thread = threading.Thread(target=self._queue, daemon=True)
        if queues:
            self._thread.start()

    @property
    def job(self) -> str:
        """Its id, "" until it is in the queue."""
        return self._queued or text_of(os.path.join(self._meeting.folder, "next"))

    def _queue(self) -> None:
        # In the environment in which this job was submitted, its secrets included: the batch script began with it.
        kept = re.compile("SLURM_(CONF|CONF_SERVER|JWT|CLUSTERS)$")
        dropped = ("SLURM", "SBATCH_", "SK_")
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            pairs = [entry.partition(b"=")[::2] for entry in file.read().split(b"\0") if entry]
        given = {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}
        environment = {name: value for name, value in given.items() if kept.match(name) or not name.startswith(dropped)}
        environment["SK_PREVIOUS"] = self._job
        command = ["timeout", "120", "sbatch", "--parsable", "--dependency=afterany:" + self._job]
        command += ["--kill-on-invalid-dep=yes", self._script]
        pause = 5.0
        job = self.waiting()  # where Slurm starts a job a second time, the first has queued one
        while self._is_wanted and not job:
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            answer = done.stdout.decode(errors="replace").strip().partition(";")[0]
            job = answer if done.returncode == 0 else self._found(pause)
            pause = min(60.0, pause * 2)
        if job:
            self._queued = job
            with suppress(OSError):  # on a full file system it is known here only
                write(os.path.join(self._meeting.folder, "next"), job)

    def _found(self, pause: float) -> str:
        """The job that a try has registered whose answer was lost: looked for twice, as it may be on its way."""
        looks = 0
        while self._is_wanted and looks < 2:
            time.sleep(pause if looks == 0 else 3.0)
            job = self.waiting()
            if job:
                return job
            looks += job is not None  # no answer is no look
        return ""

    def waiting(self) -> Optional[str]:
        """The follow-up that is in the queue, "" where there is none; None where Slurm gives no answer."""
        queue = ask("squeue", "-h", "-u", str(os.getuid()), "-t", "PD", "-o", "%i|%E|%o")
        if queue is None:
            return None
        for line in queue.splitlines():
            job, on, script = [*line.split("|", 2), "", ""][:3]
            if re.match(rf"afterany:{self._job}(\D|$)", on) and script == self._script:
                return job
        return ""

    def await_registration(self) -> bool:
        """Whether it is in the queue, after some patience with a slurmctld that is away."""
        deadline = time.monotonic() + PATIENCE
        while not self.job and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        return bool(self.job)

    def take_over(self, bad_nodes: List[str], excluded: str) -> None:
        """Let it go on; where the job fits elsewhere, without the bad nodes. The attempt after may use them again."""
        tell(f"job {self.job} goes on with this run")
        if bad_nodes:
            self._leave_out(bad_nodes, excluded)

    def _leave_out(self, nodes: List[str], excluded: str) -> None:
        names = ",".join(nodes)
        every = ",".join(filter(None, [excluded, names]))
        # Without them it need not wait until Slurm takes a dead one for down, as this job's end does.
        update = ("scontrol", "update", "JobId=" + self.job, "ExcNodeList=" + every, "Dependency=")
        code, problem = self._answer("sbatch", "--test-only", "--exclude=" + every, self._script)
        if code == 0:
            code, problem = self._answer(*update)
        if code == 0:
            tell("and without " + names)
        elif code == NO_ANSWER:
            tell(f"{names} may be used again: slurmctld gave no answer for {PATIENCE:g} s")
        else:
            tell(f"{names} may be used again, as Slurm refuses the job without: {problem}")

    @staticmethod
    def _answer(*command: str) -> Tuple[int, str]:
        """Return a command's exit code and the last line of its errors, once slurmctld answers, or after PATIENCE."""
        deadline = time.monotonic() + PATIENCE
        while True:
            code, _, errors = attempt_to_ask(*command)
            if code != NO_ANSWER or time.monotonic() >= deadline:
                return code, errors[errors.rfind("\n") + 1 :]
            time.sleep(PAUSE)

    def cancel(self) -> None:
        """It would find nothing to do."""
        self._is_wanted = False
        job = self.job or self.waiting() or ""
        if job and ask("scancel", job) is not None:
            tell(f"the follow-up, job {job}, is cancelled")
            with suppress(OSError):
                os.remove(os.path.join(self._meeting.folder, "next"))
