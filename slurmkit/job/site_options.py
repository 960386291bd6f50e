"""Options of sbatch that do what a key of the job does, under the site's rules for that key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from slurmkit.config.source import Source
from slurmkit.config.validate import origin_of, shown
from slurmkit.job.spec import JobSpec
from slurmkit.job.values import gpus_in_gres, gpus_of

if TYPE_CHECKING:
    from slurmkit.job.site import Site

_GPUS = ("gres", "gpus", "gpus_per_node", "total_gpus", "gpu_hours")
# https://slurm.schedmd.com/sbatch.html. The keys that each option acts on; the first is the one to use instead.
_KEYS = {
    "gpus-per-task": ("gpus_per_node", *_GPUS),
    "gpus-per-socket": ("gpus_per_node", *_GPUS),
    "ntasks-per-gpu": ("gpus_per_node", *_GPUS),
    "tres-per-task": ("gpus_per_node", *_GPUS),
    "tres-per-job": ("gpus", *_GPUS),
    "nodefile": ("nodelist",),
    "cluster-constraint": ("constraint",),
    "oversubscribe": ("exclusive",),
    "share": ("exclusive",),
    "mincpus": ("cpus_per_task",),
    # Rules of partitions, and nearly all others, are rules of this cluster.
    "clusters": ("partition",),
    # With pyxis, sbatch takes --container-image and the like; Slurm itself has --container for OCI bundles.
    "container": ("container",),
}

# Of srun with pyxis, apptainer and podman; srun accepts the beginning of an option.
_MOUNTS = re.compile(
    r"-[BvHS]|--(bind|mount|volume|home|scratch|overlay|fusemount|workdir|rootfs|root|tmpfs|container-mo|container-m\b)"
)


def option_refusals(site: Site, spec: JobSpec, source: Source) -> Iterator[str]:
    """Yield a refusal for each option under `sbatch` that acts on a key for which the site has a rule."""
    by_site = site.defaults(spec.partition).data.get("sbatch") or {}
    for option, value in spec.sbatch.items():
        # sbatch accepts the beginning of an option for the whole.
        full = min((name for name in _KEYS if name.startswith(option)), key=len, default=None)
        if option.startswith("container"):
            full = "container"
        if full is None or value is False or str(by_site.get(option)) == str(value):
            continue
        rule = next((rule for key in _KEYS[full] for rule in _rules_for(site, spec, key)), None)
        if rule is not None:
            key, place = rule
            yield (
                f"sbatch.{option}: {shown(value)} ({origin_of(source, ('sbatch', option))}) cannot be set: it does "
                f"what {_KEYS[full][0]} does, and the site has a rule for {key} ({place})"
            )


def mounting_options(site: Site, spec: JobSpec, source: Source) -> Iterator[str]:
    """Yield a refusal for each option of srun or the runtime that mounts folders, where the site forbids some."""
    if not site.rules.forbid.mounts:
        return
    defaults = site.defaults(spec.partition).data
    by_site = [*(defaults.get("srun") or ()), *((defaults.get("container") or {}).get("options") or ())]
    for key, words in (("srun", spec.srun), ("container.options", spec.container.options)):
        for word in words:
            if _MOUNTS.match(word) and word not in by_site:
                yield (
                    f"{key}: {word!r} ({origin_of(source, tuple(key.split('.')))}) cannot be set: it mounts folders, "
                    f"and the site forbids some ({site.place('forbid', 'mounts')}): use container.mounts"
                )


def _rules_for(site: Site, spec: JobSpec, key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the place of each rule that holds for `key`, for what lies in it, or for what holds it."""
    for prefix, rules, _ in site.rule_sets(spec.partition):
        named = [(("lock", str(index)), name) for index, name in enumerate(rules.lock)]
        for rule, name in [*named, *((("limits", name), name) for name in rules.limits)]:
            if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}."):
                yield name, site.place(*prefix, *rule)
    if key == "container" and site.rules.forbid.mounts:
        yield "forbid.mounts", site.place("forbid", "mounts")
    if key == "partition" and site.rules.partitions:
        yield "partitions", site.place("partitions")


def counted_gpus(site: Site, spec: JobSpec, source: Source) -> int | str:
    """Return the GPUs that Slurm gives the job at most, or why its request does not say how many.

    Slurm gives a job shares (shards, MPS) of one GPU per node, and with `exclusive` all GPUs of each node, whatever
    the job asks for. The defaults of the site's partition tell how many GPUs such a node has.
    """
    kinds = {item.partition(":")[0] for item in (spec.gres or "").split(",")}
    asked = spec.total_gpus or (spec.nodes if kinds & {"shard", "mps"} else 0)
    if spec.exclusive not in (True, "topo"):
        return asked
    on_node = [_gpus_of_node(site, name) for name in (spec.partition or "").split(",")]
    known = [gpus for gpus in on_node if gpus is not None]
    if known:
        return max(asked, spec.nodes * max(known))
    if spec.total_gpus:
        return asked
    return (
        f"exclusive ({origin_of(source, ('exclusive',))}) gives the job all GPUs of its nodes, and nothing says how "
        "many these are: also give gres, gpus or gpus_per_node"
    )


def _gpus_of_node(site: Site, partition: str) -> int | None:
    """Return the GPUs of a node, as the partition's defaults in the site's file give them."""
    rules = site.rules.partitions.get(partition)
    defaults = {} if rules is None else rules.defaults
    if defaults.get("gpus_per_node") is not None:
        return gpus_of(str(defaults["gpus_per_node"]))
    return None if defaults.get("gres") is None else gpus_in_gres(str(defaults["gres"]))
