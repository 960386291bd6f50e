"""What Slurm's commands print, as records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from slurmkit.slurm.client import Gres, JobState, JobUsage, Node, Partition

# squeue's and sacct's words for the same facts, in the order of JobState.
QUEUE_FIELDS = (
    *("JobArrayID", "State", "Reason", "exit_code", "NodeList", "Name", "Comment", "Partition"),
    *("SubmitTime", "StartTime", "EndTime", "TimeLimit", "RestartCnt"),
)
BOOK_FIELDS = (
    *("JobID", "State", "Reason", "ExitCode", "NodeList", "JobName", "Comment", "Partition"),
    *("Submit", "Start", "End", "Timelimit"),
)
USAGE_FIELDS = (
    *("JobID", "JobName", "Eligible", "Start", "ElapsedRaw", "NNodes", "AllocTRES", "CPUTimeRAW", "TotalCPU", "End"),
)
NODE_FIELDS = ("NodeList", "StateComplete", "CPUs", "Memory", "Gres", "Features", "PartitionName")


def rows(answer: str, mark: str, columns: int) -> Iterator[list[str]]:
    """The table in which each value is followed by `mark`, and each row by a line break: values may hold both kinds
    of white space and whatever else is not the mark.
    """
    values = answer.split(mark)[:-1]
    for start in range(0, len(values), columns):
        first, *rest = values[start : start + columns]
        yield [first.removeprefix("\n"), *rest]


def job_from(row: list[str]) -> JobState:
    """A row of QUEUE_FIELDS or BOOK_FIELDS."""
    job_id, state, reason, status, nodes, name, comment, partition, submitted, start, end, limit, *restarts = row
    exit_code, signal = _exit(status)
    return JobState(
        re.sub(r"%\d+\]$", "]", job_id),
        # sacct: CANCELLED by 1000
        state.split()[0],
        _known(reason) or "",
        exit_code,
        signal,
        _known(nodes) or "",
        name,
        _known(comment) or "",
        partition,
        _known(submitted),
        _known(start),
        _known(end),
        minutes(limit),
        int(restarts[0]) if restarts else None,
    )


def usage_from(row: list[str]) -> JobUsage:
    """A row of USAGE_FIELDS."""
    job_id, name, eligible, start, seconds, nodes, tres, cpu_seconds, cpu_used, end = row
    gpus = re.search(r"gres/gpu=(\d+)", tres)
    return JobUsage(
        job_id,
        name,
        _known(eligible),
        _known(start),
        int(seconds or 0),
        int(nodes or 0),
        int(gpus[1]) if gpus else 0,
        int(cpu_seconds or 0),
        (_seconds(cpu_used) or None) if _known(end) else None,
    )


def _seconds(time: str) -> float:
    """sacct's d-hh:mm:ss, hh:mm:ss or mm:ss.fff as seconds."""
    days, _, rest = time.rpartition("-")
    parts = [float(part) for part in rest.split(":") if part]
    return int(days or 0) * 86400.0 + sum(part * 60.0**power for power, part in enumerate(reversed(parts)))


def _known(value: str) -> str | None:
    return None if value in ("", "(null)", "N/A", "n/a", "None", "NONE", "Unknown", "None assigned") else value


def _exit(status: str) -> tuple[int, int]:
    """Exit code and signal from sacct's 7:0, or from squeue's status as wait() gives it."""
    code, colon, signal = status.partition(":")
    return (int(code), int(signal)) if colon else (int(code) >> 8, int(code) & 0x7F)


def minutes(limit: str) -> int | None:
    """Slurm's d-hh:mm:ss, hh:mm:ss or mm:ss as minutes; None of UNLIMITED, NONE and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):\d+", limit)
    return match and sum(int(part or 0) * unit for part, unit in zip(match.groups(), (1440, 60, 1), strict=True))


def gres_from(text: str) -> tuple[Gres, ...]:
    """`gpu:h100:8(S:0-1),shard:16` and the like."""
    found = []
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = [part for part in item.split(":") if part != "no_consume"]
        count = re.fullmatch(r"(\d+)([KMGTP]?)", rest[-1], re.IGNORECASE) if rest else None
        size = int(count[1]) * 1024 ** " KMGTP".index(count[2].upper() or " ") if count else 1
        if name:
            found.append(Gres(name, ":".join(rest[:-1] if count else rest), size))
    return tuple(found)


def nodes_from(table: Iterable[list[str]]) -> tuple[Node, ...]:
    """Rows of NODE_FIELDS: one for each node in each partition."""
    found: dict[str, Node] = {}
    for name, state, cpus, memory, gres, features, partition in table:
        others = found[name].partitions if name in found else ()
        found[name] = Node(
            name,
            state.upper(),
            int(cpus),
            int(memory),
            gres_from(_known(gres) or ""),
            tuple(filter(None, (_known(features) or "").split(","))),
            tuple(sorted({*others, partition})),
        )
    return tuple(sorted(found.values(), key=lambda node: node.name))


def partitions_from(answer: str, nodes: Sequence[Node]) -> tuple[Partition, ...]:
    """The lines of `scontrol --oneliner show partition`, whose values hold no spaces."""
    found = []
    for line in answer.splitlines():
        if field := dict(re.findall(r"(\S+?)=(\S*)", line)):
            found.append(
                partition_from(
                    nodes,
                    field["PartitionName"],
                    field["Default"] == "YES",
                    field["State"],
                    int(field["TotalNodes"]),
                    minutes(field["MaxTime"]),
                    minutes(field["DefaultTime"]),
                    int(field["MaxNodes"]) if field["MaxNodes"].isdigit() else None,
                )
            )
    return tuple(sorted(found, key=lambda partition: partition.name))


def partition_from(
    nodes: Sequence[Node],
    name: str,
    is_default: bool,
    state: str,
    count: int,
    max_time: int | None,
    default_time: int | None,
    max_nodes: int | None,
) -> Partition:
    """A partition with what its nodes have."""
    own = [node for node in nodes if name in node.partitions]
    cpus, memory = [node.cpus for node in own], [node.memory for node in own]
    return Partition(
        name,
        is_default,
        state,
        count,
        max_time,
        default_time,
        max_nodes,
        tuple(sorted({gres for node in own for gres in node.gres})),
        (min(cpus, default=0), max(cpus, default=0)),
        (min(memory, default=0), max(memory, default=0)),
    )
