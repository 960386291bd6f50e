"""JobSpec: what a job is. Frozen, validated, and the only thing that a template sees."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from slurmkit.config.section import AfterValidator, Field, Section, model_validator
from slurmkit.job.container import Container
from slurmkit.job.secrets import Secrets, no_secret_name
from slurmkit.job.values import (
    AbsolutePath,
    Array,
    EnvironmentName,
    Gpus,
    Gres,
    Interpreter,
    Line,
    Memory,
    Name,
    OptionWord,
    Signal,
    Time,
    Umask,
    Word,
    gpus_in_gres,
    gpus_of,
    jobs_in,
    minutes_of,
)

_OPTION = re.compile(r"[a-z][a-z0-9-]*")


def _option(option: str) -> str:
    if not _OPTION.fullmatch(option):
        raise ValueError(f"{option!r} is not a long option of sbatch, such as licenses or nice")
    # sbatch takes the beginning of an option for the whole, as long as it is unambiguous.
    own = sorted(name for name in OWN_OPTIONS if name.startswith(option))
    if own:
        key = "name" if own[0] == "job-name" else own[0].removeprefix("no-").replace("-", "_")
        hint = f": use the key {key}" if key in JobSpec.model_fields else ""
        raise ValueError(f"{'' if own[0] == option else f'short for {own[0]}, which is '}set by slurmkit itself{hint}")
    return option


Option = Annotated[str, AfterValidator(_option)]

# Options of srun that the rendered script sets, or that would break it. srun accepts the beginning of a long option.
_OF_STEP = (
    "nodes ntasks ntasks-per-node kill-on-bad-exit export jobid multi-prog pty chdir output error input het-group "
    "unbuffered wait"
)


def _srun_option(word: str) -> str:
    name = word.partition("=")[0].lstrip("-")
    is_own = name.startswith("container") or any(own.startswith(name) for own in _OF_STEP.split())
    if is_own if word.startswith("--") else word[1] in "NnKDoeiu":
        where = "; options of pyxis go into container.options" if name.startswith("container") else ""
        raise ValueError(f"{word.partition('=')[0]} is set by slurmkit itself{where}")
    return word


SrunOption = Annotated[OptionWord, AfterValidator(_srun_option)]


class RayOptions(Section):
    """Settings of Ray's bring-up on each node."""

    num_cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs that each node registers; by default those that Slurm allocated there."""

    object_store_memory: Annotated[int, Field(ge=80_000_000)] | None = None
    """Bytes of each node's object store; by default 30 % of the node's memory, or what /dev/shm holds."""

    start_timeout: Annotated[int, Field(ge=10)] = 600
    """Seconds from the job's start until every node must be registered."""


class UntilDone(Section):
    """Settings of follow-up jobs, which resume a run after a time limit, a preemption or a failed node."""

    enabled: bool = False
    """Queue a follow-up when the job starts; it goes on where the job ends before the run is complete."""

    max_attempts: Annotated[int, Field(ge=1)] | None = 20
    """Attempts in all."""

    max_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Hours since the first attempt's start after which no other begins."""

    @model_validator(mode="after")
    def _limits_need_it(self) -> UntilDone:
        for key, default in (("max_attempts", 20), ("max_hours", None)):  # a spec that was written out has both
            if getattr(self, key) != default and not self.enabled:
                raise ValueError(f"{key} limits the attempts of a run that goes on: add --until-done (enabled: true)")
        return self


class JobSpec(Section):
    """Everything that a rendered script depends on. Two equal specs render to the same bytes."""

    name: Name
    """The run's name, the job's, and its directory's."""
    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Number of nodes."""
    time: Time | None = None
    """Time limit: minutes, h:mm:ss or d-hh:mm:ss."""
    time_min: Time | None = None
    """The shortest time limit that Slurm may give instead, to start earlier."""
    partition: Line | None = None
    """Partition, or several with commas: where the job can start first."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    reservation: Line | None = None
    """Reservation to run in."""
    constraint: Line | None = None
    """Node features that must be there, such as `ib&h100`."""
    prefer: Line | None = None
    """Node features that would be better."""
    nodelist: Line | None = None
    """Nodes that must be among those of the job."""
    exclude: Line | None = None
    """Nodes that must not."""
    exclusive: bool | Literal["user", "mcs", "topo"] = False
    """Whole nodes, shared with nobody, or with the same user's jobs only."""
    gres: Gres | None = None
    """Generic resources per node: `gpu:8`, `gpu:h100:8`, `gpu:h100:4,gpu:a100:4`, `shard:4`."""
    gpus: Gpus | None = None
    """GPUs of the whole job, wherever they are: `16` or `h100:16`."""
    gpus_per_node: Gpus | None = None
    """GPUs per node: `8` or `h100:8`."""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    """CPUs on each node; there is one task per node."""
    cpus_per_gpu: Annotated[int, Field(ge=1)] | None = None
    """CPUs for each GPU."""
    mem: Memory | None = None
    """Memory per node, such as 64G; 0 is all of it."""
    mem_per_cpu: Memory | None = None
    """Memory for each CPU."""
    mem_per_gpu: Memory | None = None
    """Memory for each GPU."""
    switches: Line | None = None
    """Leaf switches at most, and how long to wait for that: `1@2:00:00`."""
    dependency: Line | None = None
    """Jobs to wait for, such as afterok:123."""
    array: Array | None = None
    """Run the command once per index: `0-7%2`; SLURM_ARRAY_TASK_ID says which."""
    signal: Signal | None = None
    """A signal before the time limit, such as B:USR2@300; the command receives it."""
    requeue: bool | None = None
    """Whether Slurm may put the job back into the queue; by default the cluster decides."""
    until_done: UntilDone = UntilDone()
    """Go on in follow-up jobs until the run is complete."""
    watchdog: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Minutes without a new line in the command's log or in metrics.jsonl after which the job writes all stacks and
    ends; by default 60 for a training configuration, and null is never."""
    mail_type: Line | None = None
    """Events that send mail: END,FAIL."""
    mail_user: Line | None = None
    """Who gets it."""
    comment: Line | None = None
    """A comment that Slurm stores with the job."""
    sbatch: dict[Option, Line | bool] = {}
    """Any other option of sbatch by its long name without dashes; true for an option without a value."""
    srun: tuple[SrunOption, ...] = ()
    """Further options of the one srun that starts all nodes, a word each: `--cpu-bind=none`, `--mpi=pmix`."""

    container: Container = Container()
    """What the job's processes run in."""
    ray: RayOptions = RayOptions()
    """How Ray is brought up."""
    env: dict[Annotated[EnvironmentName, AfterValidator(no_secret_name)], Word] = {}
    """Environment of every process of the job. Values are in the script: nothing secret."""

    secrets: Secrets = {}
    """Variables that are read when the job is submitted and carried only in its environment; the script names them."""
    umask: Umask = "077"
    """Permissions that every file of the run is made without: 077 is the user alone, 027 lets a group read."""

    prologue: tuple[Word, ...] = ()
    """Shell lines of the site's, on every node before `setup`."""
    setup: tuple[Word, ...] = ()
    """Shell lines that run on every node before Ray starts, as they are: `module load …`."""
    epilogue: tuple[Word, ...] = ()
    """Shell lines that run on the first node when the command has ended; its exit code stays the job's."""

    python: Interpreter
    """The interpreter whose environment holds ray, and slurmkit for its own trainer; a bare name is found on PATH."""

    workdir: AbsolutePath
    """Where the command starts."""
    run_dir: AbsolutePath
    """Where everything that the run leaves goes."""
    command: Annotated[tuple[Word, ...], Field(min_length=1)]
    """What runs, once, on the first node."""
    config: Word | None = None
    """The training configuration, settled and whole, as YAML; the script writes it to the run directory."""

    @model_validator(mode="after")
    def _slurm_agrees(self) -> JobSpec:
        for keys in (("gres", "gpus", "gpus_per_node"), ("mem", "mem_per_cpu", "mem_per_gpu")):
            given = [key for key in keys if getattr(self, key) is not None]
            if keys[0] == "gres" and self.gres is not None and gpus_in_gres(self.gres) == 0:
                given.remove("gres")
            if len(given) > 1:
                what = "GPUs" if keys[0] == "gres" else "memory"
                shown = " and ".join(f"{key} ({getattr(self, key)})" for key in given)
                raise ValueError(f"{shown} {'both' if len(given) == 2 else 'all'} ask for {what}; give one")
        if self.time and self.time_min and minutes_of(self.time_min) > minutes_of(self.time):
            raise ValueError(f"time_min ({self.time_min}) is longer than time ({self.time})")
        if self.array is not None and self.config is not None:
            raise ValueError(
                f"array ({self.array}) would have all its jobs train in one run directory: submit one job per run, "
                "each with its own --name"
            )
        if self.until_done.enabled and (self.array is not None or self.requeue):
            key = "array" if self.array is not None else "requeue"
            raise ValueError(f"until_done and {key} exclude each other: a run that goes on is one job after another")
        return self

    @model_validator(mode="after")
    def _names_are_ours_to_set(self) -> JobSpec:
        for name in self.env:
            if name in self.secrets:
                raise ValueError(f"env.{name} and secrets.{name} both set the variable; give one")
        return self

    @model_validator(mode="after")
    def _container_sees_the_job(self) -> JobSpec:
        if self.container.runtime != "none":
            self.container.binds(self.run_dir, self.workdir)
        return self

    @model_validator(mode="after")
    def _container_keeps_the_values(self) -> JobSpec:
        for name, value in self.env.items():
            if self.container.runtime == "apptainer" and "\r\n" in value:
                raise ValueError(
                    f"env.{name} ({value!r}) has a carriage return before a line break, which apptainer removes: "
                    "leave it out, or read the value from a file"
                )
        return self

    def directives(self) -> Iterator[tuple[str, str | None]]:
        """sbatch's options in the order in which they are rendered; None marks an option without a value."""
        for key in DIRECTIVES:
            value = getattr(self, key)
            if key == "requeue" and (value is False or self.until_done.enabled):
                yield "no-requeue", None
            elif value is True:
                yield key.replace("_", "-"), None
            elif value not in (None, False):
                yield ("job-name" if key == "name" else key.replace("_", "-")), str(value)
        yield "ntasks-per-node", "1"
        # Slurm replaces %x, %j and the like in this pattern; a % of the path itself is doubled.
        job = "%j" if self.array is None else "%A_%a"
        yield "output", self.run_dir.replace("%", "%%") + f"/slurm-{job}.out"
        yield "open-mode", "append"
        yield "chdir", self.workdir
        for option, value in sorted(self.sbatch.items()):
            if value is not False:
                yield option, None if value is True else str(value)

    @property
    def default_signal(self) -> str | None:
        """The --signal of a job that names none, early enough before the time limit to save; None if it needs none."""
        if not self.until_done.enabled or self.time is None or not minutes_of(self.time):
            return None
        return f"B:USR2@{max(1, min(300, int(minutes_of(self.time) * 15)))}"

    @property
    def keeper_flags(self) -> list[str]:
        """Flags of this job for the keeper."""
        flags = {
            "until-done": self.until_done.enabled,
            "max-attempts": self.until_done.enabled and self.until_done.max_attempts,
            "max-hours": self.until_done.max_hours,
            "trains": self.config is not None,
            "watchdog": self.watchdog,
            "exclude": self.exclude,
            "container": self.container.runtime != "none",
        }
        given = {name: value for name, value in flags.items() if value}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]

    @property
    def total_gpus(self) -> int:
        """GPUs of the whole job, shards not counted."""
        if self.gpus is not None:
            return gpus_of(self.gpus)
        per_node = gpus_of(self.gpus_per_node) if self.gpus_per_node else gpus_in_gres(self.gres or "")
        return per_node * self.nodes

    @property
    def uses_gpus(self) -> bool:
        """True if the job asks for GPUs or shares of GPUs, by any option."""
        raw = any(option.startswith("gpus") for option in self.sbatch)
        return self.total_gpus > 0 or re.search(r"\b(shard|mps)\b", self.gres or "") is not None or raw

    @property
    def names_of_environment(self) -> list[str]:
        """The job's own variables, which must reach the inside of a container."""
        return sorted({*self.env, *self.secrets})

    @property
    def gpus_on_node(self) -> int | None:
        """GPUs that the job asks for on each node; None where Slurm alone knows.

        That is on whole nodes, all of whose GPUs are the job's unless it says how many, and for GPUs by task or socket.
        """
        if self.gpus is not None:
            return gpus_of(self.gpus) // self.nodes
        raw = any(option.startswith(("gpus-", "tres-per-")) for option in self.sbatch)
        if raw or (self.exclusive in (True, "topo") and not self.gres and not self.gpus_per_node):
            return None
        return self.total_gpus // self.nodes

    def gpu_hours(self, gpus: int) -> float | None:
        """Hours of `gpus` GPUs that the job, or all of its array, uses at most; None if it has no time limit."""
        if self.time is None or not gpus:
            return None if self.time is None else 0.0
        # To Slurm 0 is no limit.
        return jobs_in(self.array) * gpus * (minutes_of(self.time) or math.inf) / 60


_NO_DIRECTIVES = (
    "until_done watchdog sbatch srun container ray env secrets umask prologue setup epilogue python workdir run_dir "
    "command config"
)
DIRECTIVES = tuple(key for key in JobSpec.model_fields if key not in _NO_DIRECTIVES.split())
OWN_OPTIONS = {key.replace("_", "-") for key in DIRECTIVES} | {
    "job-name",
    "no-requeue",
    "ntasks",
    "ntasks-per-node",
    "output",
    "error",
    "open-mode",
    "chdir",
    "wrap",
    "export",
    "export-file",
    "test-only",
    "parsable",
    "wait",
}
