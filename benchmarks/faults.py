"""The faults that a run meets in a queue, one after the other on a development cluster, beside what is known of NeMo
RL's ray.sub: how long until a fault is noticed, the job has ended, the next attempt trains, and how many finished steps
have to be made again.

    sudo python benchmarks/faults.py [--repeat 3] [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _faults import Cluster, Effect, Fault, Run, cluster_of, effect, inflict

# Seconds until a fault counts as unnoticed: the run went on.
UNNOTICED = 60


@dataclass(frozen=True)
class Row:
    """A fault, and what happens under ray.sub (shared/research/nemo-rl.md 1.5 and 1.6, slurm.md)."""

    name: str
    event: str
    fault: Fault
    ray_sub: str


def _row(name: str, event: str, ray_sub: str, after: str = "step", place: int = 1, lasts: float = 0) -> Row:
    kind = name.partition(" ")[0]
    return Row(name, event, Fault(kind, place, after, 3, lasts), ray_sub)


ROWS = (
    _row("node start", "a node dies during bring-up", "1800 s (its deadline), all GPUs held", "start"),
    _row("raylet start", "Ray dies on a node during bring-up", "up to 20 tries 10 s apart, then 1800 s", "start"),
    _row("node", "a node dies during training", "65 s: Slurm's NODE_FAIL, then a requeue that failed"),
    _row("node first", "the first node dies, and the batch script with it", "65 s: Slurm's NODE_FAIL", place=0),
    _row("raylet", "a raylet dies during training", "never: Ray is started again, job and driver see nothing"),
    _row("rank", "a rank's process is killed, as for memory", "the driver fails; no next attempt"),
    _row("driver", "the driver is killed", "its exit code is the job's; no next attempt"),
    _row("hang", "a rank hangs (watchdog: 1 minute)", "never noticed: no watchdog"),
    _row("network", "a node's network is away for 5 s", "–", lasts=5),
    _row("network long", "a node's network is away for 40 s", "–", lasts=40),
    _row("slurmd", "a slurmd is away for 5 s", "–", lasts=5),
    _row("slurmctld", "slurmctld is away for 20 s", "–", lasts=20),
    _row(
        "limit",
        "the time limit is near (--signal)",
        "all since the last save is lost, exit 0 or TIMEOUT, no next attempt",
    ),
    _row("preemption", "preempted by another partition's job", "all since the last save is lost"),
    _row("scancel", "scancel", "–"),
)


def act(run: Run, row: Row) -> tuple[float, Callable[[], None] | None]:
    """Do what the row says, as soon as there is something to kill: when that was, and what ends it where it lasts."""
    live, cluster, deadline = run.live, run.cluster, time.monotonic() + 60
    assert live is not None
    nodes = cluster.expand(live.start["nodes"])
    while time.monotonic() < deadline:
        at, ending = time.time(), None
        if row.fault.kind == "limit":  # what --signal=B:USR2@lead makes slurmctld send, at a moment that is known
            cluster.slurm("scancel", "--batch", "--signal=USR2", live.job_id)
        elif row.fault.kind == "preemption":
            other = ["-p", "high", "--exclusive", "-w", nodes[1], "-o", "/dev/null", "--wrap", "sleep 20"]
            cluster.slurm("sbatch", *other)
        elif row.fault.kind == "scancel":
            cluster.slurm("scancel", live.job_id)
        else:
            machine, ending = inflict(cluster, row.fault, nodes)
            if not machine:
                continue
        return at, ending
    raise RuntimeError(f"{row.name}: there was nothing to kill on {nodes}")


def wait(run: Run, done: Callable[[], bool], seconds: float = 300) -> bool:
    """Watch the run until `done`; False after `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        run.look()
        time.sleep(0.2)
    return True


def is_training(run: Run) -> bool:
    """Whether the newest attempt has saved a checkpoint, and nothing is known against it."""
    return run.live is not None and run.live.saved() is not None and run.live.noticed is None


def measure(run: Run, row: Row) -> Effect:
    """Inflict the row's fault on a run that trains, or begins its next attempt, and watch."""
    if not wait(run, lambda: is_training(run)):
        raise RuntimeError(f"{row.name}: the run does not train")
    if row.fault.after == "start":  # take the present attempt away first
        before = run.live
        assert before is not None
        inflict(run.cluster, Fault("driver", 0, "step", 0), run.cluster.expand(before.start["nodes"]))
        wait(run, lambda: run.live is not None and run.live is not before)
    time.sleep(row.fault.seconds)
    run.look()
    hit = run.live
    assert hit is not None
    at, ending = act(run, row)
    if row.fault.lasts:
        wait(run, lambda: time.time() > at + row.fault.lasts)
    seconds = 200 if row.fault.kind == "hang" else UNNOTICED + row.fault.lasts
    noticed = wait(run, lambda: hit.ended is not None, seconds)
    if ending is not None:
        ending()
    if not noticed:
        return Effect()
    if row.fault.kind != "scancel" and not wait(
        run, lambda: run.attempts[-1] is not hit and bool(run.attempts[-1].steps)
    ):
        raise RuntimeError(f"{row.name}: no attempt follows {hit.name}, which ended: {hit.reason}")
    return effect(run, hit, at)


def start(cluster: Cluster, folder: Path, number: int) -> Run:
    """A run that no row of the table finishes."""
    run = Run(cluster, folder / f"run{number}")
    run.submit("--until-done", "--max-attempts", "500", "--set", "watchdog=1", "grpo.max_num_steps=100000")
    return run


def go_through(rows: list[Row], run: Run, found: dict[str, list[Effect]]) -> None:
    """One measurement of each row, on one run, which has ended afterwards."""
    for row in rows:
        found[row.name].append(measure(run, row))
        print(f"{time.strftime('%H:%M:%S')} {row.name}: {found[row.name][-1]}", flush=True)
    if run.live is not None:
        run.cluster.slurm("scancel", run.live.job_id)
        wait(run, lambda: run.live is None)


def table(rows: list[Row], found: dict[str, list[Effect]]) -> str:
    """Return Markdown: medians with the least and the most, in seconds."""
    lines = [
        "| event | noticed | job ended | next attempt trains | steps lost | ray.sub |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        columns = zip(*((m.noticed, m.ended, m.training, m.steps_lost) for m in found[row.name]), strict=True)
        cells = [shown([value for value in column if value is not None]) for column in columns]
        if cells[0] == "–":
            cells = ["not at all", "–", "the job goes on", "0"]
        lines.append(f"| {row.event} | {' | '.join(cells)} | {row.ray_sub} |")
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    if not values:
        return "–"
    least, middle, most = (f"{value:.3g}" for value in (min(values), statistics.median(values), max(values)))
    return middle if least == most else f"{middle} ({least}–{most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="these rows")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    found: dict[str, list[Effect]] = {row.name: [] for row in rows}
    with cluster_of(4, "faults") as cluster, tempfile.TemporaryDirectory(prefix="faults-", dir="/var/tmp") as folder:
        for number in range(options.repeat):
            go_through(rows, start(cluster, Path(folder), number), found)
    print(table(rows, found))
    if options.json:
        options.json.write_text(json.dumps({k: [vars(m) for m in v] for k, v in found.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
