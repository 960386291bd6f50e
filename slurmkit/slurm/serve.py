"""pyslurm in a process of its own, which native.py starts by this file's path: it imports nothing of slurmkit.

Reads one JSON line per call, [name, arguments], and answers one: {"answer": …}, {"refused": …} where Slurm said no, or
{"broken": …} where pyslurm itself failed. The first line, unasked, is the version. Works with pyslurm 22.5 to 25.11.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

Row = list[Any]


def main(pyslurm: Any, answers: Any) -> None:
    print(json.dumps({"version": pyslurm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"answer": _CALLS[name](pyslurm, *arguments)}
        except pyslurm.PyslurmError as error:
            answer = {"refused": str(error)}
        except Exception as error:
            answer = {"broken": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _jobs(pyslurm: Any, job_ids: list[int], user_id: int | None) -> list[Row]:
    if len(job_ids) == 1:
        try:
            job = pyslurm.Job.load(job_ids[0])
            # load() has only the first record of an array and of a heterogeneous job.
            if not (job.array_id or job.heterogeneous_id):
                return [_job(job)]
        except KeyError:
            # load() fails at a job that has just started and has no step yet.
            pass
        except pyslurm.RPCError as error:
            if "Invalid job id" in str(error):
                return []
            raise
    wanted = set(job_ids)
    return [
        _job(job)
        for job in pyslurm.Jobs.load().values()
        if job.user_id == user_id or wanted & {job.id, job.array_id, job.heterogeneous_id}
    ]


def _job(job: Any) -> Row:
    limit, end = job.time_limit, job.end_time
    # A job without a limit has an end far in the future, for which squeue prints NONE.
    if limit is None and end and end > time.time():
        end = None
    return [
        *_start_of_row(job, job.allocated_nodes),
        *(_when(job.submit_time), _when(job.start_time), _when(end), limit, job.requeue_count),
    ]


def _accounting(pyslurm: Any, job_ids: list[int]) -> list[Row]:
    found = pyslurm.db.Jobs.load(pyslurm.db.JobFilter(ids=job_ids)).values()
    return [
        [
            *_start_of_row(job, job.nodelist),
            *(_when(job.submit_time), _when(job.start_time), _when(job.end_time), job.time_limit, None),
        ]
        for job in found
    ]


def _start_of_row(job: Any, nodes: str | None) -> Row:
    return [
        *(_id(job), job.state, _known(job.state_reason), job.exit_code or 0, job.exit_code_signal or 0),
        *(_known(nodes), job.name or "", job.comment or "", job.partition or ""),
    ]


def _id(job: Any) -> str:
    if job.array_id:
        # pyslurm takes task 0 for none.
        waiting = _tasks(job.array_tasks_waiting or "")
        return f"{job.array_id}_[{waiting}]" if waiting else f"{job.array_id}_{job.array_task_id or 0}"
    # pyslurm 22.5 does not say it of a job from accounting.
    if leader := getattr(job, "heterogeneous_id", None):
        return f"{leader}+{job.heterogeneous_offset or 0}"
    return str(job.id)


def _tasks(waiting: str) -> str:
    """Accounting gives the tasks as bits: 0x14 is 2,4 and 0x1e is 1-4."""
    if not waiting.startswith("0x"):
        return waiting
    bits = f"{int(waiting, 16):b}"[::-1]
    runs = [(run.start(), run.end() - 1) for run in re.finditer("1+", bits)]
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def _known(value: str | None) -> str:
    return "" if value in (None, "None", "None assigned") else str(value)


def _when(seconds: int | None) -> str | None:
    return datetime.fromtimestamp(seconds).isoformat() if seconds else None


def _partitions(pyslurm: Any) -> list[Row]:
    return [
        [
            *(partition.name, partition.is_default, partition.state, partition.total_nodes),
            *map(_number, (partition.max_time, partition.default_time, partition.max_nodes)),
        ]
        for partition in pyslurm.Partitions.load().values()
    ]


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _nodes(pyslurm: Any) -> list[Row]:
    return [
        [
            *(node.name, _state(node), node.total_cpus, node.real_memory),
            ",".join(f"{kind}:{count}" for kind, count in node.configured_gres.items()),
            ",".join(node.available_features or ()),
            partition,
        ]
        for node in pyslurm.Nodes.load().values()
        for partition in node.partitions or ()
    ]


def _state(node: Any) -> str:
    # Before Slurm 23.11 it is the commands that call a node MIXED.
    part = 0 < node.allocated_cpus < node.total_cpus
    return node.state.replace("ALLOCATED", "MIXED") if part else str(node.state)


def _signal(pyslurm: Any, job_id: int, name: str) -> None:
    # pyslurm is silent about a job that has ended.
    if not any(state == "RUNNING" for _, state, *_ in _jobs(pyslurm, [job_id], None)):
        raise pyslurm.PyslurmError(f"job {job_id} does not run: there is nobody to hear {name}")
    pyslurm.Job(job_id).send_signal("SIG" + name.removeprefix("SIG"), steps="batch")


_CALLS: dict[str, Callable[..., Any]] = {
    "jobs": _jobs,
    "accounting": _accounting,
    "partitions": _partitions,
    "nodes": _nodes,
    "cancel": lambda pyslurm, job_id: pyslurm.Job(job_id).cancel(),
    "signal": _signal,
    "requeue": lambda pyslurm, job_id: pyslurm.Job(job_id).requeue(),
    "hold": lambda pyslurm, job_id: pyslurm.Job(job_id).hold(),
    "release": lambda pyslurm, job_id: pyslurm.Job(job_id).release(),
}

if __name__ == "__main__":
    # What libslurm prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    import pyslurm  # type: ignore[import-not-found,unused-ignore]

    main(pyslurm, answers)
