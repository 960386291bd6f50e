"""A run on a development cluster that is killed again and again, at moments and in ways that a seed chooses; at the end
its figures must equal those of a run that was left alone, and the nodes must be as they were.

    sudo python benchmarks/soak.py [--minutes 30] [--seed 1] [--within 25] [--nodes 4] [--steps N]
        [--json FILE] [--keep]

Killed are the driver, a raylet, a slurmd (started again), a whole node (switched on again), slurmctld (started again)
and a node's network (plugged in again). After `--minutes` the kills stop and the run may finish. Exit code 1 where a
check fails, and every failed check is said.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from _faults import Attempt, Cluster, Effect, Fault, Run, cluster_of, effect, inflict, schedule, snapshot, without_times

# Seconds: without any change of the run, and after the kills have stopped, until the soak gives up.
STALLED, FINISH = 300, 1200
BEGAN = time.time()


def say(text: str) -> None:
    print(f"{time.time() - BEGAN:7.1f} s  {text}", flush=True)


@dataclass
class Event:
    """A fault that was inflicted."""

    number: int
    fault: Fault
    machine: str
    attempt: Attempt
    at: float
    over: float | None = None


def effect_of(event: Event, events: list[Event], run: Run) -> Effect:
    """An attempt's end belongs to the last event before it was noticed."""
    hit, later = event.attempt, [other.at for other in events if other.attempt is event.attempt and other.at > event.at]
    if hit.ended is None or hit.noticed is None or not event.at <= hit.noticed < min(later, default=float("inf")):
        return Effect()
    if hit.end and hit.end["code"] == 0:
        return Effect()
    return effect(run, hit, event.at)


class Teller:
    """Says each thing that is seen of a run once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._told: set[tuple[str, str]] = set()

    def tell(self) -> None:
        for number, attempt in enumerate(self._run.attempts, 1):
            who = f"attempt {number} (job {attempt.name})"
            self._once(attempt, "start", f"{who} starts on {attempt.start['nodes']}")
            if attempt.steps:
                self._once(attempt, "step", f"{who} trains, step {min(attempt.steps)}")
            if attempt.ended is not None:
                code = f"exit {attempt.end['code']}, " if attempt.end else ""
                self._once(attempt, "end", f"{who} has ended, {code}{attempt.reason}")

    def _once(self, attempt: Attempt, what: str, text: str) -> None:
        if (attempt.name, what) not in self._told:
            self._told.add((attempt.name, what))
            say(text)


def due(run: Run, fault: Fault, events: list[Event]) -> float | None:
    """When a fault is to be inflicted, as far as it is known yet."""
    live = run.live
    if live is None:
        return None
    last = events[-1] if events else None
    if fault.after == "start" and not (last and last.attempt is live):
        return live.started + fault.seconds
    saved = live.saved((last.over or last.at) if last else 0.0)
    return None if saved is None else saved + fault.seconds


def follow(run: Run, faults: Iterator[Fault], seconds: float, events: list[Event]) -> None:
    """Watch a run to its end; inflict faults for the first `seconds`, and note them. RuntimeError where none comes."""
    teller, began = Teller(run), time.time()
    fault, ending, changed, before = next(faults, None), None, time.time(), None
    while ending is not None or not run.is_over:
        run.look()
        teller.tell()
        now = time.time()
        seen = [(len(attempt.steps), attempt.ended) for attempt in run.attempts]
        if seen != before:
            before, changed = seen, now
        if now - changed > STALLED or now - began > seconds + FINISH:
            queue = run.cluster.slurm("squeue", "-o", "%i %T %r %E", check=False)
            raise RuntimeError(f"the run is not complete and nothing has changed for {now - changed:.0f} s:\n{queue}")
        if ending is not None and now >= events[-1].at + events[-1].fault.lasts:
            ending()
            ending, events[-1].over = None, time.time()
            say(f"#{events[-1].number} {events[-1].fault.kind} of {events[-1].machine} is back")
        elif ending is None and fault is not None and now - began < seconds and not run.is_over:
            moment = due(run, fault, events)
            if moment is not None and now >= moment and run.live is not None:
                nodes = run.cluster.expand(run.live.start["nodes"]) if fault.kind != "slurmctld" else [""]
                at = time.time()
                machine, ending = inflict(run.cluster, fault, nodes)
                if machine:
                    events.append(Event(len(events) + 1, fault, machine, run.live, at))
                    say(f"#{len(events)} {described(events[-1])}")
                elif now < moment + 30:
                    continue  # not there yet, or just gone
                fault = next(faults, None)
        time.sleep(0.2)


def described(event: Event) -> str:
    """An event in words."""
    steps = [step for step, seen in event.attempt.steps.items() if seen <= event.at]
    when = f"after step {max(steps)}" if steps else "during bring-up"
    lasts = f", for {event.fault.lasts:g} s" if event.fault.lasts else ""
    return f"{event.fault.kind} of {event.machine} killed {when} of job {event.attempt.name}{lasts}"


def check(run: Run, plain: Run, events: list[Event], before: dict[str, Any]) -> list[str]:
    """All that is not as it must be."""
    return [
        *problems_of_the_end(run),
        *problems_of_the_metrics(run, plain),
        *problems_of_the_attempts(run, events),
        *problems_of_the_files(run),
        *problems_of_the_nodes(run.cluster, before),
    ]


def problems_of_the_end(run: Run) -> Iterator[str]:
    last = run.attempts[-1]
    if last.end is None or last.end["code"] != 0 or last.end["goes_on"]:
        yield f"the last attempt {last.name} ended with {last.end}, not as trained"
    deadline = time.monotonic() + 60
    while queue := run.cluster.slurm("squeue", "-h", "-o", "job %i is %T (%r)"):
        if time.monotonic() > deadline:
            yield f"in the queue although the run is complete: {queue}"
            break
        time.sleep(1)
    states = run.cluster.slurm("sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", last.job_id)
    if states != "COMPLETED|0:0":
        yield f"accounting has {states} for the last job {last.job_id}"


def problems_of_the_metrics(run: Run, plain: Run) -> Iterator[str]:
    found, wanted = without_times(run.metrics), without_times(plain.metrics)
    steps = [line["step"] for line in found]
    if steps != [line["step"] for line in wanted]:
        yield f"a step is lost or doubled in metrics.jsonl: {steps}"
        return
    for line, other in zip(found, wanted, strict=True):
        names = [name for name in {**line, **other} if line.get(name) != other.get(name)]
        if names:
            which = ", ".join(f"{name} {line.get(name)} for {other.get(name)}" for name in names)
            yield f"step {line['step']} differs from the undisturbed run's: {which}"
    weights = [(one.path / f"step_{steps[-1]}/model/model.safetensors").read_bytes() for one in (run, plain)]
    if weights[0] != weights[1]:
        yield f"the weights of step {steps[-1]} differ from the undisturbed run's"


def problems_of_the_attempts(run: Run, events: list[Event]) -> Iterator[str]:
    if not any(effect_of(event, events, run).ended for event in events):
        yield "no attempt was ended by a fault: the soak has shown nothing"
    for number, attempt in enumerate(run.attempts, 1):
        nodes = run.cluster.expand(attempt.start["nodes"])
        hits = [event for event in events if event.attempt is attempt]
        if attempt.start["attempt"] != number:
            yield f"attempt {attempt.name} says that it is number {attempt.start['attempt']}, not {number}"
        if number > 1 and attempt.start["previous"] != run.attempts[number - 2].job_id:
            yield f"attempt {attempt.name} says that it follows {attempt.start['previous']}"
        if attempt.end is None:
            hard = [event for event in hits if event.fault.kind in ("node", "slurmd", "network")]
            if not any(event.machine == nodes[0] for event in hard):
                yield f"attempt {attempt.name} has no end.json, and nothing was done to its first node"
            continue
        if not attempt.end["reason"]:
            yield f"attempt {attempt.name} ended with code {attempt.end['code']} and without a reason"
        bad = set(attempt.end["bad_nodes"])
        if innocent := bad - {event.machine for event in hits}:
            yield f"attempt {attempt.name} accuses {sorted(innocent)}, to which nothing was done"
        if number < len(run.attempts) and (again := bad & set(run.cluster.expand(run.attempts[number].start["nodes"]))):
            yield f"attempt {run.attempts[number].name} ran on {sorted(again)}, bad in attempt {attempt.name}"


def problems_of_the_files(run: Run) -> Iterator[str]:
    for path in sorted(run.path.rglob("*.json")):
        if path.is_file() and not path.is_symlink():
            try:
                json.loads(path.read_text())
            except ValueError as error:
                yield f"{path} is no whole JSON: {error}"
    for path in sorted(run.path.rglob(".*")):
        is_reserved = path.is_file() and set(path.read_bytes()) == {ord("\n")}  # by a node that died
        if not is_reserved:
            yield f"{path} was left half-written"


def problems_of_the_nodes(cluster: Cluster, before: dict[str, Any]) -> Iterator[str]:
    deadline = time.monotonic() + 60
    while (now := snapshot(cluster)) != before and time.monotonic() < deadline:
        time.sleep(2)
    for node in cluster.nodes:
        (processes, files), (former_processes, former_files) = now[node], before[node]
        for words in processes - former_processes:
            yield f"{node}: a process is left: {words[:200]}"
        for words in former_processes - processes:
            yield f"{node}: a process is missing: {words[:200]}"
        for path in sorted(files - former_files):
            yield f"{node}: {path} is left"


def summary(run: Run, plain: Run, events: list[Event]) -> dict[str, Any]:
    """Figures of the soak. Seconds."""
    effects = [found for event in events if (found := effect_of(event, events, run)).ended is not None]
    wall = (run.attempts[-1].ended or 0) - run.attempts[0].started
    useful = sum(line.get("time:step", 0) for line in run.metrics)
    again = [found.training for found in effects if found.training is not None]
    detect = [found.noticed for found in effects if found.noticed is not None]
    return {
        "attempts": len(run.attempts),
        "lost_hard": sum(attempt.end is None for attempt in run.attempts),
        "faults": len(events),
        "faults_without_effect": len(events) - len(effects),
        "steps": run.metrics[-1]["step"],
        "steps_made_again": sum(found.steps_lost or 0 for found in effects),
        "seconds": round(wall, 1),
        "seconds_undisturbed": round((plain.attempts[-1].ended or 0) - plain.attempts[0].started, 1),
        "useful_share": round(useful / wall, 3),
        "mean_seconds_to_detect": round(statistics.fmean(detect), 1) if detect else None,
        "mean_seconds_to_train_again": round(statistics.fmean(again), 1) if again else None,
    }


def table(run: Run, events: list[Event]) -> Iterator[str]:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    yield f"{'#':>3} {'noticed':>8} {'ended':>8} {'training':>8} {'lost':>5}  fault"
    for event in events:
        found = effect_of(event, events, run)
        figures = (
            f"{shown(found.noticed):>8} {shown(found.ended):>8} {shown(found.training):>8} {shown(found.steps_lost):>5}"
        )
        yield f"{event.number:>3} {figures}  {described(event)}: {found.reason}"


def soak(cluster: Cluster, folder: Path, options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The undisturbed run, the disturbed one, and the checks: what is wrong, and all figures."""
    steps = f"grpo.max_num_steps={options.steps or max(20, round(options.minutes * 40))}"
    before = snapshot(cluster)
    plain, run = Run(cluster, folder / "undisturbed"), Run(cluster, folder / "soak")
    say(f"the undisturbed run is job {plain.submit(steps)}")
    follow(plain, iter(()), options.minutes * 60, [])
    if plain.attempts[-1].end is None or plain.attempts[-1].end["code"] != 0:
        return [f"the undisturbed run was not trained: {plain.attempts[-1].reason}"], {"summary": None}
    say(f"the run that is disturbed is job {run.submit('--until-done', '--max-attempts', '500', steps)}")
    events: list[Event] = []
    try:
        follow(run, schedule(options.seed, options.within), options.minutes * 60, events)
        problems = check(run, plain, events, before)
    except RuntimeError as error:
        problems = [str(error)]
    for line in table(run, events):
        print(line)
    figures = {"seed": options.seed, "summary": summary(run, plain, events) if not problems or run.is_over else None}
    figures["attempts"] = [
        {"attempt": attempt.name, "nodes": attempt.start["nodes"], "reason": attempt.reason} for attempt in run.attempts
    ]
    figures["faults"] = [
        asdict(event.fault)
        | {"machine": event.machine, "attempt": event.attempt.name}
        | asdict(effect_of(event, events, run))
        for event in events
    ]
    return problems, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of kills")
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    parser.add_argument(
        "--within", type=float, default=25, metavar="SECONDS", help="from a saved step to a kill, at most"
    )
    parser.add_argument("--nodes", type=int, default=4, help="of the cluster; the run takes two")
    parser.add_argument("--steps", type=int, help="of the run; 40 a minute, if not given")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep", action="store_true", help="leave the run directories")
    options = parser.parse_args()
    print(f"the kills of seed {options.seed}, as far as there is time for them:")
    for number, fault in enumerate(
        islice(schedule(options.seed, options.within), max(6, round(options.minutes * 1.5))), 1
    ):
        lasts = f" for {fault.lasts:g} s" if fault.lasts else ""
        print(f"  #{number} {fault.kind}{lasts} of node {fault.place}, {fault.seconds:g} s after a {fault.after}")
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/var/tmp"))
    problems: list[str] = ["interrupted"]
    try:
        with cluster_of(options.nodes, "soak") as cluster:
            problems, figures = soak(cluster, folder, options)
        print(json.dumps(figures["summary"], indent=2))
        if options.json:
            options.json.write_text(json.dumps(figures | {"problems": problems}, indent=2) + "\n")
    finally:
        if options.keep or problems:
            say(f"the run directories are in {folder}")
        else:
            shutil.rmtree(folder)
    for problem in problems:
        print(f"FAILED: {problem}")
    if problems:
        sys.exit(1)
    print("all checks passed")


if __name__ == "__main__":
    main()
