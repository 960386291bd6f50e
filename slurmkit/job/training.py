"""The training configuration of a job: what follows from the job is filled in, what does not fit it is refused."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurmkit.config.compact import compact_yaml
from slurmkit.config.data import DataSource
from slurmkit.config.load import read_config
from slurmkit.config.schema import TrainConfig
from slurmkit.config.source import Source, put
from slurmkit.config.validate import origin_of, validate
from slurmkit.errors import UserError
from slurmkit.job.layers import absolute
from slurmkit.job.secrets import refuse_tokens
from slurmkit.job.spec import JobSpec

if TYPE_CHECKING:
    from slurmkit.job.settle import Request

GPUS_OF_JOB = "the job's GPUs per node"
_NO_PATH = ("auto", "never")


def settle_training(
    config: Path, overrides: Sequence[str], source: Source, request: Request, directory: Path
) -> tuple[TrainConfig, dict[str, str]]:
    """The settled configuration and the origin of each key that has no default; `source` gets what the job runs.

    Paths in the request's flags are relative to `directory`. A request to run here, without Slurm, is told nothing of
    this machine by the GPUs asked for in the files.
    """
    read = read_config(config, overrides)
    if request.resume is not None:
        place = request.resume if request.resume in _NO_PATH else absolute(request.resume, directory)
        put(read, ("checkpointing", "resume"), place, "command line: resume")
    # Filled in before anything is judged, as how much room there is decides what fits.
    set_here = read.data.get("cluster", {})
    job = _job(source)
    gpus = None if request.local else job.gpus_on_node
    filled = Source(copy.deepcopy(read.data), dict(read.origins))
    if isinstance(set_here, dict):
        if "num_nodes" not in set_here:
            put(filled, ("cluster", "num_nodes"), job.nodes, "the job's nodes")
        if "gpus_per_node" not in set_here and gpus is not None:
            put(filled, ("cluster", "gpus_per_node"), gpus, GPUS_OF_JOB)
    train = validate(TrainConfig, filled)
    try:
        refuse_tokens(train.model_dump())
    except ValueError as error:
        raise UserError(f"{error} ({config})") from None  # not where it was set, which may show the value
    if "checkpoint_dir" in train.checkpointing.model_fields_set:
        run_dir = absolute(train.checkpointing.checkpoint_dir, Path(str(source.data["workdir"])))
        put(source, ("run_dir",), run_dir, origin_of(read, ("checkpointing", "checkpoint_dir")) or str(config))
    job = _job(source)
    problems = [*_misfits(train, set_here, read, job, gpus, source), *_missing_files(train, read, job)]
    if problems:
        raise UserError("\n".join(problems))
    settled = Source(train.model_dump(), dict(filled.origins))
    set_by = read.origins.get(("checkpointing", "checkpoint_dir"), "the job's run_dir")
    put(settled, ("checkpointing", "checkpoint_dir"), job.run_dir, set_by)
    for sources in (settled.data["data"]["train"], settled.data["data"]["validation"]):
        for each in sources if isinstance(sources, tuple) else (sources,):
            each["data_path"] = _place(DataSource.model_construct(**each), job) or each["data_path"]
    if train.logger.log_dir is not None:
        settled.data["logger"]["log_dir"] = absolute(train.logger.log_dir, Path(job.workdir))
    if (plugin := train.policy.generation.vllm_cfg.tool_parser_plugin) is not None:
        settled.data["policy"]["generation"]["vllm_cfg"]["tool_parser_plugin"] = absolute(plugin, Path(job.workdir))
    if (resume := train.checkpointing.resume) not in _NO_PATH:
        settled.data["checkpointing"]["resume"] = absolute(resume, Path(job.workdir))
    train = validate(TrainConfig, settled)
    put(source, ("config",), compact_yaml(train.model_dump(mode="json")), f"{config}")
    command = [job.python, "-m", "slurmkit.grpo", f"--config={job.run_dir}/config.yaml"]
    put(source, ("command",), command, "slurmkit's trainer")
    return train, {".".join(key): place for key, place in settled.origins.items()}


def _job(source: Source) -> JobSpec:
    """The job without what follows from the configuration, so that what it says can be relied on."""
    return validate(JobSpec, Source({**source.data, "command": ["slurmkit"]}, source.origins))


def _misfits(
    train: TrainConfig, set_here: Mapping[str, Any], read: Source, job: JobSpec, gpus: int | None, source: Source
) -> Iterator[str]:
    """What the configuration takes of nodes and GPUs that the job does not have. `gpus`: per node, where known."""

    def origin(key: str) -> str:
        written = read if "." in key else source
        return origin_of(written, tuple(key.split("."))) or "default"

    nodes = f"nodes {job.nodes} ({origin('nodes')})"
    if "num_nodes" in set_here and train.cluster.num_nodes != job.nodes:
        yield (
            f"cluster.num_nodes is {train.cluster.num_nodes} ({origin('cluster.num_nodes')}) but the job has {nodes}: "
            "leave cluster.num_nodes out, or make them equal"
        )
    if gpus is None:
        return
    if job.gpus and job.total_gpus % job.nodes:
        yield (
            f"gpus {job.gpus} ({origin('gpus')}) cannot be shared out evenly over {nodes}, and every node trains on "
            "as many: ask for gpus_per_node instead"
        )
    elif "gpus_per_node" in set_here and (asked := train.cluster.gpus_per_node) > gpus:
        has = "no GPU"
        if gpus:
            key = next(key for key in ("gpus", "gpus_per_node", "gres") if getattr(job, key))
            has = f"{gpus} per node ({key} {getattr(job, key)}, {origin(key)})"
        yield (
            f"cluster.gpus_per_node is {asked} ({origin('cluster.gpus_per_node')}) but the job asks for {has}: ask for "
            f"as many (--gpus-per-node {asked}), or leave cluster.gpus_per_node out to train on what the job has"
        )


def _place(source: DataSource, job: JobSpec) -> str | None:
    """The absolute path of what is read; None where that is nothing, or a name on the hub."""
    path = source.data_path and absolute(source.data_path, Path(job.workdir))
    return None if path and source.may_be_on_hub and not os.path.exists(path) else path


def _missing_files(train: TrainConfig, read: Source, job: JobSpec) -> Iterator[str]:
    if job.container.runtime != "none":
        return  # a path is the container's, into which only a node can look
    for key, source in train.data.sources.items():
        path = _place(source, job)
        if path and not os.path.exists(path):
            origin = origin_of(read, (*key.split("."), "data_path"))
            yield f"{key}.data_path: {path} ({origin}): no such file; a relative path begins at {job.workdir}"
    plugin = train.policy.generation.vllm_cfg.tool_parser_plugin
    if plugin is not None and not os.path.isfile(absolute(plugin, Path(job.workdir))):
        key = "policy.generation.vllm_cfg.tool_parser_plugin"
        yield f"{key}: {plugin} ({origin_of(read, tuple(key.split('.')))}): no such file"
    resume = train.checkpointing.resume
    if resume not in _NO_PATH and not os.path.isfile(Path(absolute(resume, Path(job.workdir)), "manifest.json")):
        yield (
            f"checkpointing.resume: {resume!r} ({origin_of(read, ('checkpointing', 'resume'))}) "
            "is no checkpoint, which is a folder step_N that holds a manifest.json: give one, or never, or auto"
        )
