"""The first draft of a site's file, from what the cluster says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from slurmkit.config.yaml12 import parse_value
from slurmkit.slurm.client import Gres, Partition

_HEAD = """\
# Defaults and rules for everybody who runs slurmkit here: `slurmkit site init` drafted it from what the cluster says of
# itself. Edit it, check it (slurmkit site lint FILE), and put it at /etc/slurmkit/site.yaml on the login nodes.
# docs/administrators.md explains every key.
"""
_REST = """
# Every job must give these.
# require: [account, time]

# These keep the value they have under defaults, whatever a project, a user or a flag says.
# lock: [container.runtime]

# Rules for everybody: min, max, allowed, pattern; of any key, and of total_gpus and gpu_hours.
# limits:
#   account: {pattern: "proj-[0-9]+"}
#   gpu_hours: {max: 5000}

# forbid:
#   env: [LD_PRELOAD, "NCCL_DEBUG*"]
#   mounts: [/etc, /root]

# What every job gets.
# add:
#   env: {NCCL_SOCKET_IFNAME: ib0}
#   mounts: ["/shared:/shared"]
#   prologue: [module load cuda]
#   epilogue: [sync]  # on the first node only

# Templates that extend or replace slurmkit's: a folder beside this file.
# templates: templates
"""


def draft(partitions: Sequence[Partition], pyxis: bool) -> str:
    """YAML that passes `site lint` as it is. What the cluster does not say stands in it as a comment."""
    return _HEAD + "\n".join(["", *_defaults(partitions, pyxis), _REST, *_partitions(partitions), ""])


def _defaults(partitions: Sequence[Partition], pyxis: bool) -> Iterator[str]:
    default = next((partition.name for partition in partitions if partition.is_default), None)
    yield "defaults:"
    if default is not None:
        yield f"  partition: {_text(default)}  # the cluster's own default"
    else:
        yield "  # partition: NAME  # the cluster has no default"
    if pyxis:
        yield "  container: {runtime: pyxis}  # srun here knows --container-image; a job must name its image"
    else:
        yield "  # pyxis is not installed: srun does not know --container-image"
        yield "  container: {runtime: none}"
    yield "  # time: 4:00:00"


def _partitions(partitions: Sequence[Partition]) -> Iterator[str]:
    if partitions:
        yield "partitions:"
    for partition in partitions:
        gres = sorted(set(partition.gres))
        has = (
            f"{_range(partition.cpus)} CPUs, {_range(partition.memory)} MB, {', '.join(map(_gres, gres)) or 'no GRES'}"
        )
        yield f"  {_text(partition.name)}:  # {partition.state}, {partition.nodes} nodes: {has}"
        gpus = [_gres(item) for item in gres if item.name == "gpu"]
        if len(gpus) == 1:
            yield f"    # defaults: {{gres: {_text(gpus[0])}, exclusive: true}}"
        elif gpus:
            yield f"    # defaults: {{gres: {_text(gpus[0])}}}  # nodes differ; there are also {', '.join(gpus[1:])}"
        limits = []
        if partition.nodes:
            limits.append(f"nodes: {{max: {min(partition.max_nodes or partition.nodes, partition.nodes)}}}")
        if partition.max_time is not None:
            limits.append(f"time: {{max: {_text(_time(partition.max_time))}}}")
        yield f"    limits: {{{', '.join(limits)}}}"


def _gres(item: Gres) -> str:
    return ":".join(part for part in (item.name, item.type, str(item.count)) if part)


def _range(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


def _time(minutes: int) -> str:
    return f"{minutes // 1440}-{minutes % 1440 // 60:02}:{minutes % 60:02}:00"


def _text(value: str) -> str:
    """Return the text as a YAML scalar, quoted if YAML 1.2 would read the plain form as something else."""
    # A final colon makes a key.
    is_plain = re.fullmatch(r"\w([\w.:/+-]*[\w./+-])?", value) is not None and parse_value(value) == value
    return value if is_plain else json.dumps(value)
