"""From flags, a run file and the project's file to one JobSpec, with the origin of every value."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slurmkit.config import TrainConfig, load_config
from slurmkit.config.source import Source, merge, put, read_yaml
from slurmkit.config.validate import origin_of, validate
from slurmkit.errors import UserError
from slurmkit.job.spec import JobSpec

PROJECT_FILE = "slurmkit.yaml"


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asked for on the command line, as typed.

    Example: Request(run_file=None, config=Path("examples/grpo_arithmetic.yaml"), overrides=("grpo.seed=2",),
    command=(), flags={"nodes": 2}).
    """

    run_file: Path | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settled:
    """A job that is ready to be rendered."""

    spec: JobSpec
    origins: dict[str, str]
    """Where each key of the spec was set."""

    @property
    def identity(self) -> dict[str, str]:
        """What makes two submissions attempts of the same run: the digest of what runs."""
        kind, text = "command", "\0".join(self.spec.command)
        if self.spec.config is not None:
            kind, text = "training configuration", self.spec.config
        return {kind: hashlib.sha256(text.encode()).hexdigest()}


def settle(request: Request, directory: Path) -> Settled:
    """Lay the layers over each other, weakest first: slurmkit's defaults, project file, run file, flags.

    Paths in flags are relative to `directory`, paths in a file to the file. Changes nothing on disk. UserError names
    key, value and origin.
    """
    source = merge([*_files(request, directory), _from_flags(request.flags)])
    in_file, overrides_in_file = _take_path(source, "config", directory), _take_list(source, "overrides")
    results_dir = _take_path(source, "results_dir", directory) or directory / "results"
    config, overrides = request.config, request.overrides
    if not request.command:  # which beats what a file would run
        config, overrides = config or in_file, (*overrides_in_file, *overrides)
    if config is None and not request.command and "command" not in source.data:
        raise UserError("nothing to run: give --config FILE for slurmkit's trainer, or a command of your own after --")
    if config is not None and request.command:
        raise UserError("--config and a command after -- exclude each other: --config runs slurmkit's trainer")
    if overrides and config is None:
        raise UserError(f"{overrides[0]!r} overrides a training configuration: give one with --config FILE")
    if request.command:
        source.data["command"] = list(request.command)
    defaults = {
        "name": _default_name(config, request, source.data),
        "python": sys.executable,
        "workdir": str(directory),
    }
    source = merge([Source(defaults, dict.fromkeys(((key,) for key in defaults), "default")), source])
    source.data.setdefault("run_dir", str(results_dir / str(source.data["name"])))
    if config is not None:
        train = _settle_training(config, overrides, source)
        source.data["run_dir"] = train.checkpointing.checkpoint_dir
        source.data["config"] = _as_yaml(train)
        source.data["command"] = [
            source.data["python"],
            "-m",
            "slurmkit.grpo",
            f"--config={train.checkpointing.checkpoint_dir}/config.yaml",
        ]
    spec = validate(JobSpec, source)
    return Settled(spec, {key: origin_of(source, (key,)) or "settled" for key in JobSpec.model_fields})


def _files(request: Request, directory: Path) -> list[Source]:
    project = next((up / PROJECT_FILE for up in (directory, *directory.parents) if (up / PROJECT_FILE).is_file()), None)
    paths = [path for path in (project, request.run_file) if path is not None]
    sources = []
    for path in paths:
        source = read_yaml(path)
        for key in ("config", "results_dir", "workdir", "python"):
            if isinstance(source.data.get(key), str):
                source.data[key] = _absolute(source.data[key], path.absolute().parent)
        sources.append(source)
    return sources


def _from_flags(flags: Mapping[str, Any]) -> Source:
    source = Source({}, {})
    for name, value in flags.items():
        put(source, tuple(name.split(".")), value, f"command line: {name}")
    return source


def _take_path(source: Source, key: str, directory: Path) -> Path | None:
    value = source.data.pop(key, None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{key}: {value!r} is not a path ({origin_of(source, (key,))})")
    return Path(_absolute(value, directory))


def _take_list(source: Source, key: str) -> Sequence[str]:
    value = source.data.pop(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{key}: must be a list of key=value, not {value!r} ({origin_of(source, (key,))})")
    return value


def _absolute(path: str, directory: Path) -> str:
    return os.path.normpath(directory / os.path.expanduser(os.path.expandvars(path)))


def _default_name(config: Path | None, request: Request, data: Mapping[str, Any]) -> str:
    """After the file that says what runs, in the characters that a name may have."""
    if config is not None:
        name = config.stem
    elif request.run_file is not None:
        name = request.run_file.stem
    else:
        name = os.path.basename(str((request.command or data["command"] or ["run"])[0]))
    return re.sub(r"^[._+-]+|-+$", "", re.sub(r"[^A-Za-z0-9._+-]+", "-", name))[:100] or "run"


def _settle_training(config: Path, overrides: Sequence[str], source: Source) -> TrainConfig:
    """The training configuration with what the job already says about nodes and places filled in."""
    train = load_config(config, overrides)
    nodes = source.data.get("nodes", JobSpec.model_fields["nodes"].default)
    if "num_nodes" in train.cluster.model_fields_set and train.cluster.num_nodes != nodes:
        raise UserError(
            f"cluster.num_nodes is {train.cluster.num_nodes} in {config} but the job has nodes {nodes} "
            f"({origin_of(source, ('nodes',)) or 'default'}): leave cluster.num_nodes out, or make them equal"
        )
    run_dir = source.data["run_dir"]
    if "checkpoint_dir" in train.checkpointing.model_fields_set:
        run_dir = _absolute(train.checkpointing.checkpoint_dir, Path(source.data["workdir"]))
    settled = train.model_dump()
    settled["cluster"]["num_nodes"] = nodes
    settled["checkpointing"]["checkpoint_dir"] = run_dir
    for name in ("train", "validation"):
        path = settled["data"][name]["data_path"]
        if path is not None:
            path = _absolute(path, Path(source.data["workdir"]))
            if not Path(path).is_file():
                raise UserError(f"data.{name}.data_path: {path}: no such file")
            settled["data"][name]["data_path"] = path
    return validate(TrainConfig, Source(settled, {}))


def _as_yaml(train: TrainConfig) -> str:
    # Innermost groups on one line each: complete, and still short enough to read in the script.
    return yaml.safe_dump(
        train.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
