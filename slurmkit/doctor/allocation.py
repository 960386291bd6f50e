"""The checks on the nodes of an allocation, through one srun, and what only many nodes together can tell."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from slurmkit.doctor.finding import Finding, Subject, ask
from slurmkit.doctor.machine import judge_skew
from slurmkit.doctor.queue import controller
from slurmkit.errors import Failure, UserError
from slurmkit.slurm.command import natural_order, submission_environment

# What a job asks for and srun knows too; the rest of sbatch's options is about the script or the queue.
_ASKED = frozenset(
    {"partition", "account", "qos", "reservation", "constraint", "prefer", "nodelist", "exclude", "exclusive", "gres"}
    | {"gpus", "gpus-per-node", "cpus-per-task", "cpus-per-gpu", "mem", "mem-per-cpu", "mem-per-gpu", "switches"}
    | {"comment", "licenses", "gres-flags", "contiguous", "segment", "tmp"}
)
# Seconds from the first node's hello to the last one's; from a node that cannot start; to the last report, in which
# Ray's import may be slow.
_HELLO, _LATE, _REPORT = 30.0, 3.0, 180.0
_GRACE = 15.0

Reports = dict[str, list[Finding]]


@dataclass(slots=True)
class _Heard:
    """What the nodes have said so far."""

    hello: dict[str, list[Any]] = field(default_factory=dict)
    clock: dict[str, float] = field(default_factory=dict)
    findings: Reports = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    asked: float = 0.0
    """This machine's clock when all nodes were asked for theirs, in one moment."""

    nodes: str = ""
    """Slurm's word for all nodes, such as node[1-3]."""

    said: list[str] = field(default_factory=list)
    """What srun itself said."""

    def take(self, line: str) -> None:
        """One line of a node. What prologs and shells print in between is nothing to us."""
        try:
            word = json.loads(line)
            name = word.pop("node")
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        if "hello" in word:
            self.hello[name], self.nodes = word["hello"], word["nodes"]
        elif "clock" in word:
            self.clock[name] = word["clock"]
        elif "finding" in word:
            self.findings.setdefault(name, []).append(Finding(**word["finding"]))
        elif "done" in word:
            self.done.add(name)


def examine(
    subject: Subject, nodes: int, directives: Iterable[tuple[str, str | None]], wait: float, tell: Callable[[str], None]
) -> Reports:
    """Every node's findings, from the nodes of this shell's allocation if it has one, or else of a new one.

    `directives` are the job's, as sbatch takes them; `wait` is in seconds. `tell` hears what goes on. UserError when
    Slurm refuses, Failure when no nodes are free in time. Leaves nothing: no job, no file.
    """
    if shutil.which("srun") is None:
        raise UserError("srun is not on PATH: --nodes asks Slurm for nodes; without it, this machine is checked")
    answer = controller(subject)
    if answer is not None and answer.result == "fail":
        raise Failure(f"Slurm does not answer: {answer.found} ({answer.advice})")
    here = "SLURM_JOB_ID" in os.environ
    asked = [f"--{key}" + ("" if value is None else f"={value}") for key, value in directives if key in _ASKED]
    # Not the job's time limit: a short job starts earlier.
    options = ["--overlap"] if here else ["--job-name=slurmkit-doctor", "--time=10", *asked]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with _folder(Path(subject.results)) as folder:
        on_node = replace(subject, on_node=True)
        command = [
            "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0",
            "--mpi=none", "--chdir=/", *options, sys.executable, "-P", "-m", "slurmkit.doctor.node",
            json.dumps(asdict(on_node)), str(folder),
        ]  # fmt: skip
        heard = _converse(command, dict(os.environ) if here else submission_environment(), nodes, wait, tell)
    return _together(heard)


def _together(heard: _Heard) -> Reports:
    """Add what one node alone cannot know: who is silent, whose clock differs, whose versions differ."""
    # The machine that asks is a witness, too: between two nodes alone nobody could say who is wrong.
    now = statistics.median_low([*heard.clock.values(), heard.asked])
    for name, seconds in heard.clock.items():
        finding = replace(judge_skew(seconds - now, "the other nodes"), what="clocks")
        heard.findings.setdefault(name, []).insert(0, finding)
    for name in ask("scontrol", "show", "hostnames", heard.nodes).stdout.split() or list(heard.hello):
        if name not in heard.done:
            about = [line for line in heard.said if re.search(rf"\b{re.escape(name)}\b", line)]
            found = f"no report{': ' if about else ''}{'; '.join(dict.fromkeys(about))}"
            finding = Finding("fail", found, f"does it see {sys.executable}?", what="report")
            heard.findings.setdefault(name, []).insert(0, finding)
    values = {(one.what, one.same) for findings in heard.findings.values() for one in findings if one.same}
    several = {what for what, _ in values if sum(other == what for other, _ in values) > 1}
    return {
        name: [
            replace(one, result="fail", found=one.same, advice="must be the same on all nodes")
            if one.what in several and one.same and one.result != "fail"
            else one
            for one in heard.findings[name]
        ]
        for name in sorted(heard.findings, key=natural_order)
    }


def _converse(
    command: list[str], environment: Mapping[str, str], nodes: int, wait: float, tell: Callable[[str], None]
) -> _Heard:
    heard, lines = _Heard(), Queue[tuple[str, str]]()
    step = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        bufsize=1,
        start_new_session=True,
    )
    assert step.stdin is not None
    assert step.stdout is not None
    assert step.stderr is not None
    for stream, name in ((step.stdout, "out"), (step.stderr, "err")):
        threading.Thread(target=_read, args=(stream, name, lines), daemon=True).start()

    def hear(seconds: float, enough: Callable[[], bool]) -> bool:
        """Listen until it is enough, srun has ended, or time is up; whether it was enough."""
        end = time.monotonic() + seconds
        while not enough():
            try:
                name, line = lines.get(timeout=min(0.5, max(0.0, end - time.monotonic())))
            except Empty:
                if time.monotonic() >= end or step.poll() is not None:
                    return enough()
                continue
            if name == "out":
                heard.take(line)
            elif text := line.strip():
                heard.said.append(text)
                if "queued and waiting" in text:
                    tell(f"{text.removeprefix('srun: ')}, for {wait:g} s at most")
        return True

    try:
        if not hear(wait, lambda: bool(heard.hello)):
            _explain(step.poll(), heard.said, nodes, wait)
        hear(_HELLO, lambda: len(heard.hello) == nodes or any("Exited with" in line for line in heard.said))
        hear(_LATE, lambda: len(heard.hello) == nodes)
        tell(f"{len(heard.hello)} of {nodes} nodes answer: {', '.join(sorted(heard.hello, key=natural_order))}")
        heard.asked = time.time()
        with suppress(BrokenPipeError):
            step.stdin.write(json.dumps(heard.hello) + "\n")
        hear(_REPORT, lambda: len(heard.done) == len(heard.hello))
        # The end of their input lets the nodes go; what srun says of those that never spoke comes meanwhile.
        with suppress(BrokenPipeError):
            step.stdin.close()
        hear(2.0, lambda: step.poll() is not None and lines.empty())
    finally:
        if step.poll() is None:
            step.send_signal(signal.SIGTERM)  # which gives an allocation back, and a place in the queue
        try:
            step.wait(_GRACE)
        except subprocess.TimeoutExpired:
            step.kill()
    return heard


def _explain(code: int | None, said: list[str], nodes: int, wait: float) -> None:
    """Why no node spoke."""
    words = "; ".join(line.removeprefix("srun: ").removeprefix("error: ") for line in said) or "it said nothing"
    if code is None:
        job = re.search(r"job (\d+)", words)
        reason = ask("squeue", "--noheader", f"--jobs={job[1]}", "--format=%r").stdout.strip() if job else ""
        raise Failure(
            f"{nodes} nodes were not free within {wait:g} s{f' (Slurm says: {reason})' if reason else ''}; the request "
            "was taken back. Ask for fewer --nodes, another --partition, or give it longer with --immediate"
        )
    if not said or "execve" in words or "Exited with" in words:
        raise Failure(f"no node could run {sys.executable}; srun ended with exit code {code}: {words}")
    raise UserError(f"Slurm would not give these nodes: {words}")


def _read(stream: IO[str], name: str, lines: Queue[tuple[str, str]]) -> None:
    for line in stream:
        lines.put((name, line))


@contextmanager
def _folder(results: Path) -> Iterator[Path]:
    """A folder in the results directory for the files by which nodes find out whether they share it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".slurmkit-doctor-", dir=results))
    except OSError as error:
        raise UserError(f"{results} cannot be written: {error.strerror}; give another --results-dir") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
