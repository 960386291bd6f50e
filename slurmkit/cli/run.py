"""slurmkit run"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from slurmkit.cli.options import JobCommand, job_options, request_from
from slurmkit.errors import INTERRUPTED
from slurmkit.job.settle import settle
from slurmkit.run.local import run_here

_TAIL = 30


@click.command("run", cls=JobCommand)
@job_options(slurm=False)
@click.pass_context
def command(context: click.Context, /, words: tuple[str, ...], **options: Any) -> None:
    """Train on this machine, without Slurm: the same run directory, the same driver."""
    from slurmkit.report.terminal import PatientConsole, RunProgress

    # Whatever a project's file says: here is one node.
    request = request_from(context, words, {**options, "nodes": 1})._replace(local=True)
    settled = settle(request, Path.cwd())
    secrets = settled.read_secrets()  # before the progress is drawn, as a command may ask for a passphrase
    run_dir = Path(settled.spec.run_dir)
    console = PatientConsole(soft_wrap=True, highlight=False)
    console.print(f"run directory  {run_dir}", markup=False)
    with RunProgress(run_dir, console) as progress:
        code = run_here(settled, secrets, progress.update, lambda line: console.print(line, markup=False))
    log = run_dir / "attempts/latest/driver.log"
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        in_order = code == INTERRUPTED
        console.print("\n".join(lines[-1:] if in_order else lines), markup=False)
        end = (
            "interrupted in order (85): the same command goes on"
            if in_order
            else f"error: the run ended with exit code {code}"
        )
        click.echo(f"{end}; its whole log is {log}", err=True)
        sys.exit(code)
    facts: dict[str, Path | str] = {
        "run directory": run_dir,
        "log": log,
        "plot": run_dir / "plots/validation_reward.png",
        "its page": f"slurmkit report {shlex.quote(str(run_dir))}",
    }
    if options["config"] is not None:
        facts["try next"] = f"slurmkit run --config {shlex.quote(str(options['config']))} --name another grpo.seed=2"
    console.print("done", markup=False)
    for label, fact in facts.items():
        if not isinstance(fact, Path) or fact.exists():
            console.print(f"{label:<15}{fact}", markup=False)
