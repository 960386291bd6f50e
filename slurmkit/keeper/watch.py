"""The keeper's part on the first node, which watches the whole job."""

import os
import signal
import time
from contextlib import suppress
from typing import Any, Dict, List, Optional, Tuple

from slurmkit.keeper.chain import Chain, Limits
from slurmkit.keeper.follow_up import FollowUp
from slurmkit.keeper.judge import judge, last_lines, lines_after, may_go_on, why_slurm_ends_it
from slurmkit.keeper.meeting import BEAT, INTERRUPTED, Meeting, ask, show, size_of, tell

# Looks without a new sign of life after which a node is lost: while Ray starts, in training, when the command has
# ended. They are counted, and not seconds, as a file system that stands still for all is no sign of a dead node.
STARTING, TRAINING, ENDING = 4, 10, 5
# Seconds that nodes may take to leave, and to write their stacks; that srun may take to end when all have left; for
# which a mark that ends the job is tried again if there is no space for it: Slurm's KillWait is 30 s.
LEAVING, STACKS, STEP, MARK = 15 * BEAT, 20.0, 2.5 * BEAT, 20.0


class Watch:
    """The whole job, from its first node."""

    def __init__(
        self,
        meeting: Meeting,
        limits: Limits,
        watchdog: Optional[float],
        excluded: str,
        stands_in: bool = False,
        container: bool = False,
    ) -> None:
        """`excluded`: nodes that the job does without anyway. Who stands in for another queues no follow-up."""
        self._meeting = meeting
        self._chain = Chain(meeting, limits, time.time())
        self._watchdog = None if watchdog is None else watchdog * 60
        self._excluded = excluded
        self._nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        self.follow_up: Optional[FollowUp] = None
        if limits.until_done and not self._chain.end(self._chain.number, 0, time.time()):
            self.follow_up = FollowUp(meeting, queues=not stands_in)
        self._why = ""
        self._is_cancelled = False
        self._looked = time.monotonic() - BEAT  # the second node stands in only for a first that has looked
        self._beats: Dict[str, Tuple[str, int]] = {}
        self._progress: Optional[List[int]] = None
        self._progressed = time.monotonic()
        self._leaving: Optional[float] = None
        self._left: Optional[float] = None
        self._container = container
        self._is_over = False

    def until_over(self) -> int:
        """Watch until the batch script says that the nodes have left; the job's exit code."""
        batch = os.getppid()
        signal.signal(signal.SIGHUP, self._end)  # for a script that has no space left to write that
        while not (self._meeting.has("over") or self._is_over):
            if os.getppid() != batch:  # it was killed hard
                return 1
            self.look()
            time.sleep(0.2)
        if self._meeting.has("code"):
            # The second node has ended the job while this one did not answer; its scancel cancels no run.
            return int(self._meeting.text("code"))
        if self._meeting.has("signal.TERM"):
            self._ask_slurm()
        self._await_silent_nodes()
        return self.conclude()

    def _await_silent_nodes(self) -> None:
        """Watch on if the command failed and a node did not leave: srun may end before its heartbeats are missed."""
        deadline = time.monotonic() + (ENDING + 3) * BEAT
        while (
            self._meeting.text("exit_code") not in ("", "0", str(INTERRUPTED))
            and not (self._why or self._meeting.of("failed") or self._meeting.of("bad"))
            and len({*self._meeting.of("left"), *self._meeting.of("leaving")}) < self._nodes
            and time.monotonic() < deadline
        ):
            self.look()
            time.sleep(BEAT / 10)

    def _end(self, *_: Any) -> None:
        self._is_over = True

    def look(self) -> None:
        """Check signals, signs of life, progress and the step once."""
        if self._meeting.has("signal.TERM"):
            self._ask_slurm()
        if time.monotonic() >= self._looked + BEAT:
            self._looked = time.monotonic()
            # On a full file system no node can give a sign of life.
            if self._meeting.publish("watching", str(self._looked)):
                self._look_at_nodes()
            self._look_at_progress()
        self._end_step()

    def _look_at_nodes(self) -> None:
        looks = TRAINING if self._meeting.has("started") else STARTING
        if self._meeting.has("exit_code") or self._meeting.of("failed"):
            looks = ENDING
        left = {**self._meeting.of("left"), **self._meeting.of("leaving")}
        for rank, text in self._meeting.of("alive").items():
            name, _, beat = text.partition(" ")
            last, missed = self._beats.get(rank, ("", 0))
            missed = missed + 1 if beat == last else 0
            self._beats[rank] = beat, missed
            if missed >= looks and rank not in left and not self._meeting.has("lost." + rank):
                self.lose(rank, name, f"no sign of life for {looks * BEAT:g} s")

    def lose(self, rank: str, name: str, reason: str) -> None:
        """A node is gone: tell the others, which leave."""
        self._meeting.publish("lost." + rank, name)
        self._meeting.publish("bad." + name, reason)
        self._meeting.publish("failed." + name, reason)

    def _look_at_progress(self) -> None:
        if self._watchdog is None or not self._meeting.has("started") or self._leaving is not None:
            return
        paths = [os.path.join(self._meeting.folder, "driver.log"), os.path.join(self._meeting.run, "metrics.jsonl")]
        sizes = [size_of(path) for path in paths]
        if sizes != self._progress:
            self._progress, self._progressed = sizes, time.monotonic()
        if time.monotonic() < self._progressed + self._watchdog:
            return
        self._meeting.publish("stacks")
        deadline = time.monotonic() + STACKS
        while len(self._meeting.of("stacks")) < self._nodes and time.monotonic() < deadline:
            time.sleep(0.2)
        text = f"no progress for {self._watchdog:g} s, as driver.log and metrics.jsonl say"
        self._meeting.publish("failed.watchdog", f"{text}; see {self._meeting.folder}/stacks-*")

    def _ask_slurm(self) -> None:
        """Ask Slurm why it ends this job, and let the command save first if it may."""
        # The batch script writes a text.
        is_step_s = self._meeting.text("signal.TERM") == "" and not self._meeting.has("started")
        with suppress(OSError):
            os.remove(os.path.join(self._meeting.meet, "signal.TERM"))
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = "{}_{}".format(array, os.environ["SLURM_ARRAY_TASK_ID"]) if array else os.environ["SLURM_JOB_ID"]
        fields = ["-h", "-t", "all", "-O", "State:30,Reason:50,PreemptTime:30", "-j", job]
        state, reason, preempted = [*(ask("squeue", *fields, timeout=5) or "").split(), "", "", ""][:3]
        if is_step_s and state == "RUNNING" and not preempted.startswith("2"):
            # srun ends a step of which a task has failed.
            self._meeting.publish("failed.step", "srun ended the step", MARK)
            return
        self._why, self._is_cancelled = why_slurm_ends_it(state, reason, preempted)
        if reason == "NodeDown" or state == "NODE_FAIL":
            self._find_down()
        if self._meeting.of("failed"):
            return  # the nodes leave already
        if self._is_cancelled or not self._meeting.has("started"):
            self._meeting.publish("failed.slurm", self._why, MARK)
        elif not self._meeting.has("sent.USR2"):
            self._meeting.publish("signal.USR2", "", MARK)

    def _find_down(self) -> None:
        ranks = {text.partition(" ")[0]: rank for rank, text in self._meeting.of("alive").items()}
        down = ask("sinfo", "-h", "-N", "-t", "down", "-n", os.environ["SLURM_JOB_NODELIST"], "-o", "%N", timeout=5)
        for name in sorted(set((down or "").split())):
            self.lose(ranks.get(name, name), name, "Slurm says that it is down")

    def _end_step(self) -> None:
        """End an srun that would wait for a lost node until Slurm gives that up, when all others have left."""
        if self._leaving is None and (self._meeting.has("exit_code") or self._meeting.of("failed")):
            self._leaving = time.monotonic() + LEAVING
        if self._leaving is None:
            return
        lost, left = self._meeting.of("lost"), self._meeting.of("left")
        if self._left is None and self._meeting.of("bad") and len({*lost, *left}) >= self._nodes:
            self._left = time.monotonic() + (0.0 if lost else STEP)
        has_left = self._left is not None and time.monotonic() >= self._left
        if (has_left or time.monotonic() > self._leaving) and self._meeting.has("srun"):
            with suppress(ProcessLookupError):
                os.kill(int(self._meeting.text("srun")), signal.SIGKILL)
            self._leaving = time.monotonic() + LEAVING

    def conclude(self) -> int:
        """Say what ended the attempt, record it, and let the run go on, or not."""
        has_space = self._meeting.has_space()
        # From the line that the script prints before srun: srun may fail before this process has started.
        output = lines_after("/proc/self/fd/1", f"logs in {self._meeting.folder}")
        verdict = judge(self._meeting, self._why, self._is_cancelled, output, self._container)
        for text, log in verdict.said:
            tell(text + (f"; the end of {os.path.join(self._meeting.folder, log)}:" if log else ""))
            if log:
                show("\n".join(last_lines(os.path.join(self._meeting.folder, log), 30)))
        end: Dict[str, Any] = {
            "code": verdict.code,
            "reason": verdict.reason,
            "ended": int(time.time()),
            "bad_nodes": verdict.bad_nodes,
            "cancelled": self._is_cancelled,
            "never_started": verdict.never_started,
        }
        goes_on = self._chain.limits.until_done and may_go_on(verdict.code) and not self._is_cancelled
        stop = self._chain.end_after(verdict.code, time.time(), verdict.never_started) if goes_on else ""
        if goes_on and not has_space:
            stop = "; ".join(filter(None, [stop, "free some space and submit it again to resume"]))
        if goes_on and not stop:
            # For whoever looks, and for the follow-up, should Slurm kill this job while it waits.
            self._meeting.record("end.json", dict(end, goes_on=True))
            if self.follow_up is None or not self.follow_up.await_registration():
                stop = "Slurm gives no answer, and no follow-up could be queued"
        if stop:
            goes_on = False
            end["reason"] += "; " + stop
            tell(stop)
        self._meeting.record("end.json", dict(end, goes_on=goes_on))
        if self.follow_up is not None:
            if goes_on:
                self.follow_up.take_over(verdict.bad_nodes, self._excluded)
            else:
                self.follow_up.cancel()
        self._meeting.publish("code", str(verdict.code))
        self._meeting.release()
        return verdict.code
