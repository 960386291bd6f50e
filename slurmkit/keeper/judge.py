"""Verdict on an attempt: why it ended, from the files of its nodes and from Slurm."""

import os
import re
import signal
from contextlib import suppress
from typing import Dict, List, NamedTuple, Sequence, Tuple

from slurmkit.keeper.meeting import CANCELLED, INTERRUPTED, NODES_FAILED, Meeting, ask

NODE_IS_DOWN = "Slurm ends it, as a node is down"
# Characters that are read of a job's output.
_LOG_LIMIT = 100_000
# Facts named failed.X that are not about a node X.
_NO_NODES = ("slurm", "step", "watchdog")
# Lines of the job's output that do not say why a step failed: slurmkit's, and srun's and spank's about the others.
_NOISE = re.compile(
    r"slurmkit: (job|Ray is)|(srun: )?(Terminating|Job step|launch/slurm)|srun: error: \S+ tasks? .*:|"
    r"slurmstepd: error: (spank|Failed to invoke spank|\*\*\*|pyxis: (printing|couldn't start))"
)


def may_go_on(code: int) -> bool:
    """Return True if another attempt may work: nodes failed, the command saved and left, or a signal killed it."""
    return code in (NODES_FAILED, INTERRUPTED) or code > 128


def why_slurm_ends_it(state: str, reason: str, preempted: str) -> Tuple[str, bool]:
    """Return why a job got SIGTERM, from squeue's words, and whether somebody cancelled it."""
    if reason == "TimeLimit":
        return "it has reached its time limit", False
    if preempted.startswith("2"):  # a time, and not N/A
        return "it is preempted", False
    if reason == "NodeDown" or state == "NODE_FAIL":
        return NODE_IS_DOWN, False
    if state == "CANCELLED" or (state, reason) == ("COMPLETING", "None"):
        return "it was cancelled", True
    shown = f"shows the job as {state}" + (f" ({reason})" if reason not in ("", "None") else "")
    return f"it got SIGTERM, and squeue {shown if state else 'gives no answer'}", False


class Verdict(NamedTuple):
    """Verdict on why an attempt ended."""

    code: int
    reason: str
    bad_nodes: List[str]
    said: List[Tuple[str, str]]
    """What the job's output is told, each with the log whose end belongs to it."""
    never_started: bool = False
    """True if it ended before the command started, though no node was lost: another attempt may well end so, too."""


def judge(
    meeting: Meeting, why: str, is_cancelled: bool, output: Sequence[str] = (), container: bool = False
) -> Verdict:
    """Judge an attempt by the facts that its nodes have published.

    `why` is Slurm's reason to end the job, "" if it did not. `output` is the job's output since the step began, and
    `container` True if the step runs in one.
    """
    killed, failed, bad = meeting.of("killed"), meeting.of("failed"), meeting.of("bad")
    said = [(f"node {node}: {text}", "") for node, text in killed.items()]
    ended, _, over = meeting.text("over").partition(" ")  # the script's own code, and why
    if not meeting.has("srun"):
        reason = over or why or meeting.full or f"the job's script ended with exit code {ended}"
        return Verdict(int(ended or NODES_FAILED), reason, [], [(reason, "")])
    code = int(meeting.text("exit_code") or -1)
    # Whoever writes its stacks dies of it; so does, of the signal before Slurm's end, whoever does not know it.
    if "watchdog" in failed or (why and code == 128 + signal.SIGUSR2):
        code = -1
    if code == 0:
        return Verdict(0, "the command is done", [], said)
    nodes = [name for name in bad if name not in killed]  # a node has no fault if its memory was too small
    if code > 0 and not is_cancelled:
        text, is_of_node = _command_failed(meeting, code, why, nodes)
        said.append((text, "driver.log"))
        code = NODES_FAILED if is_of_node else code
    elif "slurm" in failed or (why and not failed):
        code = CANCELLED
        said.append(("ended by Slurm: " + (why or failed["slurm"]), ""))
    else:
        code = NODES_FAILED
    if code == NODES_FAILED:
        words, nodes = _nodes_failed(meeting, nodes, over, output, container)
        said += words
    if meeting.full and code != INTERRUPTED:
        said.append((meeting.full, ""))
    reason = " ".join("; ".join(text for text, _ in said).split())[:4000]
    never_started = code == NODES_FAILED and not (meeting.has("started") or meeting.of("lost"))
    return Verdict(code, reason, nodes if code == NODES_FAILED else [], said, never_started)


def _command_failed(meeting: Meeting, code: int, why: str, bad_nodes: List[str]) -> Tuple[str, bool]:
    """Say how the command ended with `code`, and whether a node is the cause."""
    if code == INTERRUPTED:
        is_near = "its time limit or a preemption is near (USR2)" if meeting.has("sent.USR2") else "it was asked to"
        return f"interrupted: {why or is_near}; the command saved and left in order", False
    last = last_lines(os.path.join(meeting.folder, "driver.log"), 200)
    error = next((line[7:] for line in reversed(last) if line.startswith("error: ")), "")
    died = any(re.search("OutOfMemoryError|WorkerCrashedError|ActorDiedError", line) for line in last)
    is_of_memory = bool(meeting.of("killed")) and (code == 137 or died)
    text = "; ".join(filter(None, [f"the command failed with exit code {code}", error, why]))
    return text, bool(bad_nodes) or why == NODE_IS_DOWN or is_of_memory


def _nodes_failed(
    meeting: Meeting, bad_nodes: List[str], over: str, output: Sequence[str], container: bool
) -> Tuple[List[Tuple[str, str]], List[str]]:
    """Say what nodes report, or srun if no node does, and return the nodes that are to blame."""
    failed, lost, has_started = meeting.of("failed"), meeting.of("lost").values(), meeting.has("started")
    said = [(failed["watchdog"], "")] if "watchdog" in failed else []
    nodes = {name: text for name, text in failed.items() if name not in _NO_NODES}
    if not (nodes or said or meeting.has("exit_code")):
        text, bad_nodes = _step_failed(meeting, over, output, container)
        return [(text, "")], bad_nodes
    if not (has_started or lost) and len(nodes) >= meeting.nodes > 1:
        return _alike(meeting, nodes), []
    for name, text in nodes.items():
        quoted = "" if has_started or name in lost else _end_of(meeting, name)
        log = f"node-{name}.log"
        is_there = os.path.exists(os.path.join(meeting.folder, log))
        said.append((f"node {name}: {text}{quoted}", log if is_there else ""))
    return said, bad_nodes


def _alike(meeting: Meeting, failed: Dict[str, str]) -> List[Tuple[str, str]]:
    """Return the messages of a failure on all nodes, each once. It blames no node."""
    texts: Dict[str, str] = {}
    for name, text in failed.items():
        texts.setdefault(text + _end_of(meeting, name), name)
    count = len(failed)
    return [(f"all {count} nodes failed: {text}", f"node-{name}.log") for text, name in list(texts.items())[:3]]


def _end_of(meeting: Meeting, node: str) -> str:
    """The last lines of a node's log that are not slurmkit's own, to be shown behind a message."""
    lines = [line.strip() for line in last_lines(os.path.join(meeting.folder, f"node-{node}.log"), 50)]
    lines = [line for line in lines if line and not re.match(r"\d\d:\d\d:\d\d \+\d+s ", line)]
    return (": " + " | ".join(lines[-2:]))[:500] if lines else ""


def _step_failed(meeting: Meeting, over: str, output: Sequence[str], container: bool) -> Tuple[str, List[str]]:
    """Say why a step ended of which no node says so, and return the nodes that are to blame."""
    text = "\n".join(output)
    names: List[str] = []
    for hosts in re.findall(r"^srun: error: (\S+): tasks? [\d,-]+: Exited with exit code", text, re.MULTILINE):
        names += (ask("scontrol", "show", "hostnames", hosts) or hosts).split() if "[" in hosts else [hosts]
    absent = sorted({name for name in names if not os.path.exists(os.path.join(meeting.folder, f"node-{name}.log"))})
    words: List[str] = []
    for line in output:
        line = re.sub(r"^slurmstepd: error: ", "", line.strip())
        if line and line not in words and not _NOISE.match(line) and not _NOISE.match("slurmstepd: error: " + line):
            words.append(line)
    quoted = (": " + " | ".join(words[-3:]))[:800] if words else ""
    if not absent:
        return f"the command did not finish ({over or 'srun gave no exit code'}){quoted}", []
    what = "the container" if container else "the job step"
    is_all = len(absent) >= meeting.nodes
    where = f"node {absent[0]}" if len(absent) == 1 else f"{len(absent)} nodes ({absent[0]}, …)"
    return f"{what} did not start on {where}{quoted}", [] if is_all and len(absent) > 1 else absent


def last_lines(path: str, count: int) -> List[str]:
    """The end of a log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - count * 500))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def lines_after(path: str, mark: str) -> List[str]:
    """Return the lines of a log after the last one that ends with `mark`: at most _LOG_LIMIT characters.

    Empty if the log has no such line, or is a pipe.
    """
    if not os.path.isfile(path):
        return []
    text = ""
    is_after = False
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in iter(lambda: file.readline(_LOG_LIMIT), ""):
            if line.rstrip("\n").endswith(mark):
                text, is_after = "", True
            elif is_after and len(text) < _LOG_LIMIT:
                text = (text + line)[:_LOG_LIMIT]
    return text.splitlines()
