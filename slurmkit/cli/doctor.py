"""slurmkit doctor"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from slurmkit.cli.names import echo_json
from slurmkit.cli.options import JobCommand, job_options, request_from
from slurmkit.doctor import machine, queue
from slurmkit.doctor.allocation import Reports, examine
from slurmkit.doctor.finding import RESULTS, Finding, Subject
from slurmkit.job.settle import settle

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
# Names in one group, and groups of one result.
_MANY, _TEXTS = 8, 4


@click.command("doctor", cls=JobCommand)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.option(
    "--immediate",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="With --nodes: give up when the nodes are not free within this time.",
)
@job_options(slurm=True)
@click.pass_context
def command(context: click.Context, /, as_json: bool, immediate: float, words: tuple[str, ...], **options: Any) -> None:
    """Check this machine, or with --nodes that many nodes, for what a job needs.

    The options and the run file say what the job would ask for, as with submit. Exit code 1 when something fails.
    """
    nodes = options["nodes"]
    if options["config"] is None and not context.meta["command"]:
        context.meta["command"] = ("true",)
    spec = settle(request_from(context, words, options), Path.cwd()).spec
    # Run directories are made with the folders above them; what must be writable is the first that exists.
    above = Path(spec.run_dir).parents
    results = next(path for path in above if path.is_dir())
    in_job = "SLURMD_NODENAME" in os.environ
    subject = Subject(spec.python, str(results), spec.container.runtime, spec.partition, on_node=in_job)
    if nodes is None:
        ok = _one_machine(subject, as_json)
    else:
        reports = examine(subject, spec.nodes, spec.directives(), immediate, lambda line: click.echo(line, err=True))
        ok = _many_nodes(reports, as_json)
    sys.exit(0 if ok else 1)


def _one_machine(subject: Subject, as_json: bool) -> bool:
    checks = [machine.CHECKS] if subject.on_node else [queue.CHECKS, machine.CHECKS]
    seen = []
    for group in checks:
        for finding in group.run(subject):
            seen.append(finding)
            if not as_json:
                _show(finding.result, finding.what, finding.found, finding.advice)
    ok = all(finding.result != "fail" for finding in seen)
    if as_json:
        echo_json({"ok": ok, "machine": socket.gethostname(), "checks": list(_plain(seen))})
    return ok


def _many_nodes(reports: Reports, as_json: bool) -> bool:
    ok = all(finding.result != "fail" for findings in reports.values() for finding in findings)
    if as_json:
        echo_json({"ok": ok, "nodes": {name: list(_plain(findings)) for name, findings in reports.items()}})
        return ok
    for what in dict.fromkeys(finding.what for findings in reports.values() for finding in findings):
        told: dict[tuple[str, str], list[str]] = {}  # (result, what was found) -> names
        worst: Finding | None = None
        for name, findings in reports.items():
            for finding in (one for one in findings if one.what == what):
                # Numbers differ between healthy nodes; who is well needs no more than a count.
                told.setdefault((finding.result, "" if finding.result == "ok" else finding.found), []).append(name)
                if worst is None or RESULTS.index(finding.result) > RESULTS.index(worst.result):
                    worst = finding
        assert worst is not None
        if worst.result == "ok":
            text = f"ok on {_count(len(told[('ok', '')]))}: {worst.found}"
        else:
            text = "; ".join(
                _group(result, {found: names for (other, found), names in told.items() if other == result})
                for result in reversed(RESULTS)
                if any(other == result for other, _ in told)
            )
        _show(worst.result, what, text, worst.advice)
    return ok


def _group(result: str, told: dict[str, list[str]]) -> str:
    """Example: _group("fail", {"no space": ["node3"]}) is "fail on node3: no space"."""
    if result == "ok":
        return f"ok on {_count(sum(map(len, told.values())))}"
    if len(told) > _TEXTS:  # a number that differs on each node: one example will do
        told = {f"such as {next(iter(told))}": [name for names in told.values() for name in names]}
    groups = []
    for found, names in told.items():
        more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
        groups.append(f"{result} on {', '.join(names[:_MANY])}{more}: {found}")
    return "; ".join(groups)


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _show(result: str, what: str, found: str, advice: str) -> None:
    colour = False if "NO_COLOR" in os.environ else None
    to_do = f"  -> {advice}" if advice else ""
    click.echo(f"{click.style(f'{result:<4}', fg=_COLOURS[result])}  {what:<18} {found}{to_do}", color=colour)


def _plain(findings: Iterable[Finding]) -> Iterator[dict[str, str]]:
    for finding in findings:
        kept = asdict(finding)
        yield {key: kept[key] for key in ("what", "result", "found", "advice")}
