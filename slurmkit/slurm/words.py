"""Slurm's own words for why a job waits and how it ended, in everybody's."""

from __future__ import annotations

import re

# https://slurm.schedmd.com/job_reason_codes.html
_WAITS = {
    "": "not looked at yet",
    "Priority": "waiting for its turn by priority",
    "Resources": "next in turn, waiting for nodes to become free",
    "Dependency": "waiting for another job to end",
    "DependencyNeverSatisfied": "waiting for a job that did not end as it should: this one will never start",
    "BeginTime": "waiting for the time before which it must not start",
    "Cleaning": "being cleaned up after, before it starts again",
    "JobHeldUser": "held by its user: scontrol release lets it go on",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held, because it was queued again too often",
    "launch_failed_requeued_held": "held, because it could not be launched: scontrol release lets it try again",
    "PartitionTimeLimit": "its time limit is longer than the partition allows",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows, or has up",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition starts no jobs at present",
    "PartitionConfig": "the partition does not allow what it asks for",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no node has all that it asks for",
    "Reservation": "waiting for its reservation to begin",
    "ReservationDeleted": "its reservation was deleted",
    "Licenses": "waiting for a licence",
    "Prolog": "its nodes are being prepared",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "AccountNotAllowed": "its account may not use this partition",
    "QOSNotAllowed": "its QOS may not be used here",
    "QOSUsageThreshold": "the QOS has used up its threshold",
    "JobArrayTaskLimit": "as many tasks of its array run as may run at once",
    "MaxBatchLimit": "as many jobs run as may run at once",
    "BurstBufferStageIn": "waiting for its burst buffer",
    "AssociationJobLimit": "at the limit of its account: jobs",
    "SchedDefer": "Slurm looks at it when it plans next",
    "FedJobLock": "waiting for the other clusters of the federation",
    "OutOfMemory": "out of memory",
    "TimeLimit": "out of time",
}
# AssocGrpGRES, QOSMaxCpuPerUserLimit, AssocMaxWallDurationPerJobLimit, …
_LIMIT = re.compile(
    r"(?P<whose>Assoc|QOS)(?P<kind>Grp|Max|Min)(?P<what>.+?)(?P<each>Per(?:User|Account|Acct|Job|Node))?(?:Limit)?"
)
_WHAT = {"gres": "GPUs", "cpu": "CPUs", "mem": "memory", "node": "nodes", "wall": "time", "wallduration": "time"}
_WHAT |= {"jobs": "jobs", "submitjobs": "jobs in the queue", "submit": "jobs in the queue", "bb": "burst buffers"}
_ENDS = {
    "BOOT_FAIL": "a node did not boot",
    "CANCELLED": "cancelled",
    "COMPLETED": "done",
    "DEADLINE": "its deadline passed",
    "FAILED": "failed",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted by another job",
    "REVOKED": "runs on another cluster of the federation",
    "TIMEOUT": "out of time",
}


def why_it_waits(reason: str) -> str:
    """Such as `waiting for its turn by priority` of Priority. An unknown reason is given back as it is."""
    # ReqNodeNotAvail, UnavailableNodes:node1
    word, _, detail = reason.partition(",")
    nodes = detail.partition("UnavailableNodes:")[2].strip("() ")
    if word in _WAITS:
        return _WAITS[word] + (f": {nodes}" if nodes else "")
    found = _LIMIT.fullmatch(reason)
    if found is None:
        return reason
    what = _resource(found["what"])
    if found["kind"] == "Min":
        return f"below the least that its {_whose(found)} allows: {what}"
    each = found["each"].removeprefix("Per").lower() if found["each"] else ""
    whom = f" per {each.replace('acct', 'account')}" if each else " of all together" if found["kind"] == "Grp" else ""
    return f"at a limit of its {_whose(found)}: {what}{whom}"


def how_it_ended(state: str) -> str:
    """Such as `out of time` of TIMEOUT."""
    return _ENDS.get(state, state)


def _whose(found: re.Match[str]) -> str:
    return "account" if found["whose"] == "Assoc" else "QOS"


def _resource(text: str) -> str:
    for ending, unit in (("RunMinutes", " × minutes of running jobs"), ("Minutes", " × minutes")):
        if text.endswith(ending):
            return _resource(text.removesuffix(ending)) + unit
    return _WHAT.get(text.lower(), text)
