"""What would fail on the compute node, found on the login node before anything is submitted.

Every check is a look at a file system; the one question to Slurm, `sbatch --test-only`, is asked beside them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from slurmkit.config.log_dir import problem_with
from slurmkit.job.container import missing_parts
from slurmkit.job.secrets import looks_exposed
from slurmkit.job.settle import Settled
from slurmkit.job.spec import JobSpec
from slurmkit.job.values import minutes_of
from slurmkit.run.forecast import duration

# Of any run: scripts, records, and a log of each node. A single row of tasks is never as long as this.
_FLOOR_BYTES, _FLOOR_FILES, _ROW_BYTES = 100e6, 1000, 10_000_000
# What each node usually has for itself.
_LOCAL = ("/tmp", "/dev/shm")


class Remark(NamedTuple):
    """One line: key, value, where it was set, and what would be right."""

    text: str
    is_problem: bool = True
    """It cannot work, in contrast to what probably was not meant."""


def look(settled: Settled) -> list[Remark]:
    """Everything that can be told before Slurm is asked. Changes nothing on disk."""
    checks = (_workdir, _interpreter, _container, _shared, _run_directory, _program, _time, _cpus, _exposed)
    of_training = () if settled.train is None else (_gpus, _model, _resume, _log_dir, _tasks, _wandb)
    return [remark for check in (*checks, *of_training) for remark in check(settled)]


def _is_inside(settled: Settled) -> bool:
    """Whether the job runs in a container, into which only a node can look."""
    return settled.spec.container.runtime != "none"


def _said(settled: Settled, key: str) -> str:
    return f"{key}: {getattr(settled.spec, key)} ({settled.origins.get(key, 'default')})"


def _configured(settled: Settled, key: str, value: object) -> str:
    written = re.sub(r"\.\d+\..*", "", key)  # a list has the place of its key
    return f"{key}: {value} ({settled.config_origins.get(key) or settled.config_origins.get(written, 'default')})"


def _environment(spec: JobSpec) -> dict[str, str]:
    return {**os.environ, **spec.env}


def _workdir(settled: Settled) -> Iterator[Remark]:
    path = settled.spec.workdir
    if not os.path.isdir(path) or not os.access(path, os.X_OK):
        what = "cannot be entered" if os.path.isdir(path) else "is no folder" if os.path.lexists(path) else "is missing"
        yield Remark(f"{_said(settled, 'workdir')} {what}: Slurm would start the command in /tmp instead")


def _interpreter(settled: Settled) -> Iterator[Remark]:
    spec = settled.spec
    if "/" not in spec.python or _is_inside(settled):
        return
    if not os.path.isfile(spec.python) or not os.access(spec.python, os.X_OK):
        what = "cannot be executed" if os.path.exists(spec.python) else "is missing"
        yield Remark(f"{_said(settled, 'python')} {what}: name the interpreter whose environment holds ray")
    elif not (spec.setup or spec.prologue or _which("ray", spec)):
        yield Remark(
            f"{_said(settled, 'python')}: ray is neither beside it nor on PATH, so the nodes could not start Ray: "
            "install slurmkit[train] there, or bring ray onto PATH with a line of setup",
            is_problem=False,
        )


def _container(settled: Settled) -> Iterator[Remark]:
    for key, problem in missing_parts(settled.spec):
        yield Remark(f"{key}: {problem} ({settled.origins.get(key, 'default')})")


def _which(program: str, spec: JobSpec) -> str | None:
    return shutil.which(program, path=f"{os.path.dirname(spec.python)}:{_environment(spec).get('PATH', os.defpath)}")


def _shared(settled: Settled) -> Iterator[Remark]:
    spec = settled.spec
    keys = ["workdir"] if _is_inside(settled) else ["workdir", "python"]
    if not Path(spec.run_dir).is_relative_to(spec.workdir):
        keys.append("run_dir")
    for key in keys:
        path = Path(getattr(spec, key))
        local = next((root for root in _LOCAL if path.is_relative_to(root)), None)
        if local is not None:
            yield Remark(
                f"{_said(settled, key)} lies in {local}, which on most clusters each node has for itself: use a file "
                "system that all nodes share",
                is_problem=False,
            )


def _run_directory(settled: Settled) -> Iterator[Remark]:
    path = settled.spec.run_dir
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    said = _said(settled, "run_dir")
    if not os.path.isdir(path):
        what = "a link that leads nowhere" if os.path.islink(path) else "a file"
        yield Remark(f"{said}: {path} is {what}, not a folder: give another --results-dir")
    elif not os.access(path, os.W_OK | os.X_OK):
        yield Remark(f"{said}: {path} is not writable: give another --results-dir")
    else:
        yield from _space(settled, path)


def _space(settled: Settled, folder: str) -> Iterator[Remark]:
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    need, why = _FLOOR_BYTES, "scripts and logs"
    if settled.train is not None and settled.train.checkpointing.enabled and (parameters := _parameters(settled)):
        from slurmkit.run.footprint import model_bytes, space_of

        each, count = space_of(settled.train, parameters, Path(settled.spec.run_dir))
        need += count * each + model_bytes(settled.train, parameters)
        kept = _configured(settled, "checkpointing.keep_top_k", settled.train.checkpointing.keep_top_k)
        why = f"{count} more checkpoints of {_size(each)} at a time, with the latest and the one being written; {kept}"
    said = f"{_said(settled, 'run_dir')}: {folder} has {_size(free)} free"
    if free < need:
        yield Remark(f"{said}, the run needs {_size(need)} ({why}): make room, or give another --results-dir")
    elif free < 2 * need:
        yield Remark(f"{said}, of which the run needs {_size(need)} ({why})", is_problem=False)
    # A file system that makes inodes as it needs them says that it has 0.
    if found.f_files and found.f_favail < _FLOOR_FILES:
        yield Remark(f"{said}, but room for {found.f_favail} files only: remove some, or give another --results-dir")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _parameters(settled: Settled) -> float:
    """Of the model that is trained; 0 where that is not known here."""
    if settled.train is None:
        return 0
    from slurmkit.run.footprint import find_model, parameters_in, parameters_of

    policy = settled.train.policy
    if policy.from_scratch is not None:
        return parameters_of(policy.from_scratch)
    if policy.model_name is None or _is_inside(settled):
        return 0
    folder, _ = find_model(policy.model_name, settled.spec.workdir, _environment(settled.spec))
    return parameters_in(folder) if folder is not None else 0


def _program(settled: Settled) -> Iterator[Remark]:
    spec = settled.spec
    program = spec.command[0]
    if spec.config is not None or _is_inside(settled):
        return
    # Another job, or a line of setup, may still make it.
    made_later = bool(spec.dependency or spec.setup or spec.prologue)
    said = f"command: {program} ({settled.origins.get('command', 'default')})"
    if "/" in program:
        path = os.path.join(spec.workdir, program)
        if not os.path.isfile(path) or not os.access(path, os.X_OK):
            what = (
                "is no file" if os.path.isdir(path) else "is not executable" if os.path.exists(path) else "is missing"
            )
            yield Remark(f"{said} {what}; a relative path begins at workdir {spec.workdir}", not made_later)
    elif not made_later and not _which(program, spec):
        yield Remark(f"{said} is not on this machine's PATH: a file is named with its path, as ./{program}", False)


def _cpus(settled: Settled) -> Iterator[Remark]:
    spec = settled.spec
    gpus = spec.gpus_on_node or 0
    chosen = spec.cpus_per_task or spec.cpus_per_gpu or spec.exclusive or spec.ray.num_cpus
    if gpus > 1 and not chosen and not {"mincpus", "ntasks-per-gpu"} & spec.sbatch.keys():
        key = next(name for name in ("gpus", "gpus_per_node", "gres") if getattr(spec, name))
        yield Remark(
            f"{_said(settled, key)} asks for {gpus} GPUs and 1 CPU on each node, unless the partition has "
            "DefCpuPerGPU: add --cpus-per-task or --exclusive",
            is_problem=False,
        )


def _exposed(settled: Settled) -> Iterator[Remark]:
    for key in ("command", "setup", "epilogue"):
        for what in looks_exposed(getattr(settled.spec, key)):
            place = settled.origins.get(key, "default")
            yield Remark(
                f"{key} ({place}) holds what may be a secret after {what}: the script is stored and shown. Name it "
                "under secrets and use the variable",
                is_problem=False,
            )


def _gpus(settled: Settled) -> Iterator[Remark]:
    spec, key = settled.spec, "cluster.gpus_per_node"
    if settled.train is None:
        return
    from slurmkit.job.training import GPUS_OF_JOB

    have, used, origin = spec.gpus_on_node, settled.train.cluster.gpus_per_node, settled.config_origins.get(key)
    asked = next((name for name in ("gpus", "gpus_per_node", "gres") if getattr(spec, name)), "")
    if have is None and origin is None:
        yield Remark(
            f"{_configured(settled, key, used)}, and how many GPUs the job's nodes have is not known here: say it "
            "(--gpus-per-node 8) to train on all of them",
            is_problem=False,
        )
    elif have == 0 and origin == GPUS_OF_JOB:
        yield Remark(
            f"{_configured(settled, key, used)}: it asks for no GPU, so the run trains on the CPU: ask for some "
            f"(--gpus-per-node 8), or say that it is meant with {key}=0",
            is_problem=False,
        )
    elif have is not None and have > used:
        yield Remark(
            f"{_configured(settled, key, used)} leaves {have - used} of the {have} GPUs on each node idle that the job "
            f"asks for with {_said(settled, asked)}: leave it out to train on all of them",
            is_problem=False,
        )
    if spec.gpus is not None and spec.nodes > 1:
        yield Remark(
            f"{_said(settled, 'gpus')} leaves to Slurm how many each node gives, and every node trains on as many: "
            f"ask for gpus_per_node {have} instead",
            is_problem=False,
        )


def _model(settled: Settled) -> Iterator[Remark]:
    spec = settled.spec
    # A run that goes on opens its own checkpoint instead.
    if settled.train is None or _is_inside(settled) or any(Path(spec.run_dir).glob("step_*/manifest.json")):
        return
    policy = settled.train.policy
    name, template = policy.model_name, policy.tokenizer.chat_template
    if template is not None and not Path(spec.workdir, template).is_file():
        said = _configured(settled, "policy.tokenizer.chat_template", template)
        yield Remark(f"{said}: no such file; a relative path begins at workdir {spec.workdir}", not spec.dependency)
    if name is not None:
        from slurmkit.run.footprint import find_model

        _, problem = find_model(name, spec.workdir, _environment(spec), needs_template=template is None)
        if problem is not None:
            yield Remark(f"{_configured(settled, 'policy.model_name', name)}: {problem}", not spec.dependency)


def _resume(settled: Settled) -> Iterator[Remark]:
    train, key = settled.train, "checkpointing.resume"
    there = sorted(path.parent.name for path in Path(settled.spec.run_dir).glob("step_*/manifest.json"))
    if train is not None and train.checkpointing.resume == "never" and there:
        yield Remark(
            f"{_configured(settled, key, 'never')}: {settled.spec.run_dir} holds {', '.join(there)}, which starting "
            "anew would overwrite: give another --name, remove them, or go on with auto"
        )


def _log_dir(settled: Settled) -> Iterator[Remark]:
    path, spec = settled.train.logger.log_dir if settled.train else None, settled.spec
    if path is None:
        return
    said = _configured(settled, "logger.log_dir", path)
    if _is_inside(settled):
        mounts = spec.container.binds(spec.run_dir, spec.workdir)
        if not any(Path(path).is_relative_to(mount.target) and not mount.read_only for mount in mounts):
            yield Remark(f"{said} is not in the container: add it to container.mounts, with the same path inside")
        return
    if problem := problem_with(Path(spec.run_dir), Path(path)):
        yield Remark(f"{said}: {problem}")
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
        what = "not writable" if os.path.isdir(path) else "not a folder"
        yield Remark(f"{said}: {path} is {what}")


def _tasks(settled: Settled) -> Iterator[Remark]:
    train = settled.train
    if train is None or _is_inside(settled):
        return
    from slurmkit.run.footprint import steps_at_most

    for key, source in train.data.sources.items():
        path = source.data_path
        # What is a folder, or on the hub, only the trainer's library can read.
        if path is not None and not os.path.isdir(path) and not (source.may_be_on_hub and not os.path.exists(path)):
            problem = _first_bytes(path) if path.endswith(".parquet") else _first_row(path)
            if problem is not None:
                yield Remark(f"{_configured(settled, f'{key}.data_path', path)}: {problem}")
    if steps_at_most(train, 1) == 0:
        key = "grpo.num_prompts_per_step"
        yield Remark(
            f"{_configured(settled, key, train.grpo.num_prompts_per_step)} is more than the training tasks times "
            f"grpo.max_num_epochs {train.grpo.max_num_epochs}: there is not one step to make"
        )


def _first_bytes(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return None if file.read(4) == b"PAR1" else "is no Parquet file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _first_row(path: str) -> str | None:
    """What is wrong with the first line that holds something; the trainer reads them all."""
    try:
        with open(path, "rb") as rows:
            first = next((row for row in iter(lambda: rows.readline(_ROW_BYTES), b"") if row.strip()), None)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    try:
        row = json.loads(first) if first is not None else None
    except ValueError:
        return "the first line is not JSON: it must be a JSONL file, one task per line"
    if row is None:
        return "holds no task"
    return None if isinstance(row, dict) else "the first line is not a JSON object: one task per line, as {...}"


def _time(settled: Settled) -> Iterator[Remark]:
    spec = settled.spec
    if spec.time and 0 < minutes_of(spec.time) * 60 < spec.ray.start_timeout:
        yield Remark(
            f"{_said(settled, 'time')} is {duration(minutes_of(spec.time))}, less than bringing Ray up may take "
            f"(ray.start_timeout {spec.ray.start_timeout} s); hours are written 4:00:00",
            is_problem=False,
        )


def _wandb(settled: Settled) -> Iterator[Remark]:
    if settled.train is None or not settled.train.logger.wandb_enabled or settled.train.logger.wandb.mode != "online":
        return
    environ = _environment(settled.spec)
    netrc = environ.get("NETRC") or os.path.expanduser("~/.netrc")
    if not ({"WANDB_API_KEY", "WANDB_MODE"} & environ.keys() or "WANDB_API_KEY" in settled.spec.secrets) and not (
        settled.spec.setup or settled.spec.prologue or os.path.isfile(netrc)
    ):
        yield Remark(
            f"{_configured(settled, 'logger.wandb.mode', 'online')} needs a key, and there is neither WANDB_API_KEY "
            f"nor {netrc}: export it, run `wandb login`, or set logger.wandb.mode=offline",
            is_problem=False,
        )
