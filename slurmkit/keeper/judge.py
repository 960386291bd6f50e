"""What ended an attempt, from what its nodes left behind and from Slurm's word."""

import os
import re
import signal
from typing import List, NamedTuple, Tuple

from slurmkit.keeper.meeting import CANCELLED, INTERRUPTED, NODES_FAILED, Meeting

_UNFINISHED = "the command did not finish: a node failed"


def may_go_on(code: int) -> bool:
    """Whether the same may well work the next time: nodes failed, it saved and left, or a signal killed it."""
    return code in (NODES_FAILED, INTERRUPTED) or code > 128


def why_slurm_ends_it(state: str, reason: str, preempted: str) -> Tuple[str, bool]:
    """In words, and whether somebody cancelled it, from what squeue says of a job that got SIGTERM."""
    if reason == "TimeLimit":
        return "it has reached its time limit", False
    if preempted.startswith("2"):  # a time, and not N/A
        return "it is preempted", False
    if reason == "NodeDown" or state == "NODE_FAIL":
        return "Slurm ends it, as a node is down", False
    if state == "CANCELLED" or (state, reason) == ("COMPLETING", "None"):
        return "it was cancelled", True
    return "Slurm sent SIGTERM ({})".format(", ".join(filter(None, [state, reason])) or "squeue gives no answer"), False


class Verdict(NamedTuple):
    """What ended an attempt."""

    code: int
    reason: str
    bad_nodes: List[str]
    said: List[Tuple[str, str]]
    """What the job's output is told, each with the log whose end belongs to it."""


def judge(meeting: Meeting, why: str, is_cancelled: bool) -> Verdict:
    """From what the nodes left behind. `why`: Slurm's reason to end the job, if it did."""
    killed, failed, bad = meeting.of("killed"), meeting.of("failed"), meeting.of("bad")
    said = [(f"node {node}: {text}", "") for node, text in killed.items()]
    log = os.path.join(meeting.folder, "driver.log")
    ended, _, over = meeting.text("over").partition(" ")  # the script's own code, and why
    if not meeting.has("srun"):
        reason = over or why or f"the job's script ended with exit code {ended}"
        return Verdict(int(ended), reason, [], [(reason, "")])
    code = int(meeting.text("exit_code") or -1)
    # Whoever writes its stacks dies of it; so does, of the signal before Slurm's end, whoever does not know it.
    if "watchdog" in failed or (why and code == 128 + signal.SIGUSR2):
        code = -1
    if code == 0:
        return Verdict(0, "the command is done", [], said)
    if code > 0 and not is_cancelled:
        if code == INTERRUPTED:
            cause = why or (
                "its time limit or a preemption is near (USR2)" if meeting.has("sent.USR2") else "it was asked to"
            )
            said.append((f"interrupted: {cause}; the command saved and left in order", "driver.log"))
        else:
            last = last_lines(log, 200)
            error = next((line[7:] for line in reversed(last) if line.startswith("error: ")), "")
            parts = [f"the command failed with exit code {code}", error, why]
            said.append(("; ".join(filter(None, parts)), "driver.log"))
            died = any(re.search("OutOfMemoryError|WorkerCrashedError|ActorDiedError", line) for line in last)
            if killed and (code == 137 or died):
                code = NODES_FAILED  # a driver that fails because of memory fails because of its node
    elif "slurm" in failed or (why and not failed):
        code = CANCELLED
        said.append(("ended by Slurm: " + (why or failed["slurm"]), ""))
    else:
        code = NODES_FAILED
        said.append((f"{_UNFINISHED} ({over})", ""))
    if code == NODES_FAILED:
        for name, text in failed.items():
            is_node = os.path.exists(os.path.join(meeting.folder, f"node-{name}.log"))
            said.append((f"node {name}: {text}", f"node-{name}.log") if is_node else (text, ""))
    # A node has no fault where its memory was too small.
    nodes = [name for name in bad if name not in killed] if code == NODES_FAILED else []
    reasons = [text for text, _ in said if not (failed and text.startswith(_UNFINISHED))]
    return Verdict(code, " ".join("; ".join(reasons).split()), nodes, said)


def last_lines(path: str, count: int) -> List[str]:
    """The end of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - count * 500))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
