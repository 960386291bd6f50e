"""What a job costs and when it would start, in one line each."""

from __future__ import annotations

from datetime import datetime, timedelta

from slurmkit.job.spec import JobSpec
from slurmkit.job.values import jobs_in, minutes_of
from slurmkit.slurm.client import Estimate


def cost(spec: JobSpec) -> str:
    """Such as `8 nodes × 8 GPUs × 4 h = 256 GPU-hours at most`; without GPUs it is node-hours."""
    gpus, jobs = spec.total_gpus, jobs_in(spec.array)
    whole = spec.exclusive in (True, "topo")
    factors = [] if spec.array is None else [_count(jobs, "job")]
    if spec.gpus is None:
        factors.append(_count(spec.nodes, "whole node" if whole else "node"))
    if gpus:
        factors.append(_count(gpus if spec.gpus else gpus // spec.nodes, "GPU"))
    minutes = minutes_of(spec.time) if spec.time else 0
    unit, amount = ("GPU", gpus) if gpus else ("node", spec.nodes)
    if not minutes:
        return f"{' × '.join(factors)}: {_number(amount * jobs)} {unit}-hours per hour; no time limit is asked for"
    hours = f"{_number(amount * jobs * minutes / 60)} {unit}-hours"
    rest = ", and the GPUs of these nodes that it leaves" if whole and gpus else ""
    return f"{' × '.join([*factors, duration(minutes)])} = {hours} at most{rest}"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def duration(minutes: float) -> str:
    """Such as `30 min` or `1.5 h`."""
    return f"{minutes:g} min" if minutes < 60 else f"{_number(minutes / 60)} h"


def start(spec: JobSpec, estimate: Estimate) -> str:
    """When the job would start, as far as Slurm knows."""
    if spec.dependency is not None:
        return f"when its dependency allows: {spec.dependency}"
    if spec.sbatch.get("hold"):
        return "when it is released: scontrol release JOBID"
    if estimate.start is None:
        return "unknown: Slurm gives no estimate"
    soon = (datetime.now() + timedelta(minutes=1)).isoformat(timespec="seconds")
    return "now" if estimate.start <= soon else f"estimated {estimate.start}"
