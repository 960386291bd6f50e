"""JobSpec: what a job is. Frozen, validated, and the only thing that a template sees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from slurmkit.config.schema import Section

# A name is also a folder's name and a word in file patterns, so it is kept plain.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_TIME = re.compile(r"\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
_MEMORY = re.compile(r"\d+[KMGTkmgt]?")
_GRES = re.compile(
    r"[A-Za-z_]\w*(:[A-Za-z0-9_.-]+)?(:\d+[KMGTkmgt]?)?(,[A-Za-z_]\w*(:[A-Za-z0-9_.-]+)?(:\d+[KMGTkmgt]?)?)*"
)
_GPUS = re.compile(r"([A-Za-z0-9_.-]+:)?\d+")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(API_KEY|ACCESS_KEY|SECRET|TOKEN|PASSWORD|CREDENTIALS)$", re.IGNORECASE)
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# Slurm reads each directive into a buffer of this many bytes, and cuts the rest off in silence.
_DIRECTIVE_BYTES = 8000


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} cannot be a run's name: use letters, digits and . _ + - (100 at most), beginning with a "
            "letter or a digit"
        )
    return value


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"{value!r} holds a line break or another character that cannot stand in a directive")
    if len(value.encode()) > _DIRECTIVE_BYTES:
        raise ValueError(f"is {len(value.encode())} bytes long; sbatch reads {_DIRECTIVE_BYTES} at most")
    if not value:
        raise ValueError("is empty; leave the key out instead")
    return value


def _matching(pattern: re.Pattern[str], right: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{value!r} is not {right}")
        return value

    return AfterValidator(check)


def _path(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError(f"{value!r} is not an absolute path")
    if "\\" in value or not value.isprintable():
        raise ValueError(f"{value!r} holds a backslash or a line break, which sbatch's file patterns cannot carry")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} holds a NUL byte, which no argument can carry")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{value!r} is not valid Unicode text") from None
    return value


def _number_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


# In a YAML file `mem: 64` and `OMP_NUM_THREADS: 8` are numbers, and mean the same as the text.
Line = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_one_line)]
Word = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_no_nul)]
AbsolutePath = Annotated[str, AfterValidator(_path)]


class Container(Section):
    """What the job's processes run in."""

    runtime: Literal["none"] = "none"
    """`none`: straight on the node. Each further runtime is one file in templates/container/."""


class RayOptions(Section):
    """How Ray is brought up on each node."""

    num_cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs that each node registers; by default those that Slurm allocated there."""

    object_store_memory: Annotated[int, Field(ge=80_000_000)] | None = None
    """Bytes of each node's object store; by default 30 % of the node's memory, or what /dev/shm holds."""

    start_timeout: Annotated[int, Field(ge=10)] = 600
    """Seconds from the job's start until every node must be registered."""


class JobSpec(Section):
    """Everything that a rendered script depends on. Two equal specs render to the same bytes."""

    name: Annotated[str, AfterValidator(_name)]
    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    time: Annotated[Line, _matching(_TIME, "a Slurm time: minutes, h:mm:ss or d-hh:mm:ss")] | None = None
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    reservation: Line | None = None
    constraint: Line | None = None
    nodelist: Line | None = None
    exclude: Line | None = None
    exclusive: bool = False
    gres: Annotated[Line, _matching(_GRES, "a GRES such as gpu:8 or gpu:h100:8")] | None = None
    gpus_per_node: Annotated[Line, _matching(_GPUS, "a count or TYPE:COUNT, such as 8 or h100:8")] | None = None
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    mem: Annotated[Line, _matching(_MEMORY, "a size such as 64G")] | None = None
    dependency: Line | None = None
    comment: Line | None = None
    sbatch: dict[str, Line | bool] = {}
    """Any other option of sbatch by its long name without dashes; true for an option without a value."""

    container: Container = Container()
    ray: RayOptions = RayOptions()
    env: dict[str, Word] = {}
    """Environment of every process of the job. Values are in the script: nothing secret."""

    setup: Annotated[tuple[Word, ...], Field(strict=False)] = ()
    """Shell lines that run on every node before Ray starts, as they are: `module load …`."""

    python: AbsolutePath
    """The interpreter whose environment holds ray, and slurmkit for its own trainer."""

    workdir: AbsolutePath
    run_dir: AbsolutePath
    command: Annotated[tuple[Word, ...], Field(min_length=1, strict=False)]
    config: Word | None = None
    """The training configuration, settled and whole, as YAML; the script writes it to the run directory."""

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        if self.gres is not None and "gpu" in self.gres and self.gpus_per_node is not None:
            raise ValueError(f"gres ({self.gres}) and gpus_per_node ({self.gpus_per_node}) both ask for GPUs; give one")
        for name in self.env:
            if not _ENVIRONMENT_NAME.fullmatch(name):
                raise ValueError(f"env: {name!r} cannot name an environment variable")
            if name.startswith(("SLURM", "SBATCH_")):
                raise ValueError(f"env: {name} belongs to Slurm and cannot be set")
            if _SECRET.search(name):
                raise ValueError(
                    f"env: {name} looks like a secret, and the script that would hold it is stored and shown: export "
                    "it in your shell, whose environment the job inherits"
                )
        for option in self.sbatch:
            if not _OPTION.fullmatch(option):
                raise ValueError(f"sbatch: {option!r} is not a long option of sbatch, such as switches or mail-type")
            if option in _OWN_OPTIONS:
                raise ValueError(f"sbatch: {option} is set by slurmkit itself{_own_key(option)}")
        return self

    def directives(self) -> Iterator[tuple[str, str | None]]:
        """sbatch's options in the order in which they are rendered; None marks an option without a value."""
        for key in _DIRECTIVES:
            value = getattr(self, key)
            if value is True:
                yield key.replace("_", "-"), None
            elif value not in (None, False):
                yield ("job-name" if key == "name" else key.replace("_", "-")), str(value)
        yield "ntasks-per-node", "1"
        # Slurm replaces %x, %j and the like in this pattern; a % of the path itself is doubled.
        yield "output", self.run_dir.replace("%", "%%") + "/slurm-%j.out"
        yield "open-mode", "append"
        yield "chdir", self.workdir
        for option, value in sorted(self.sbatch.items()):
            if value is not False:
                yield option, None if value is True else str(value)


_DIRECTIVES = (
    "name",
    "nodes",
    "time",
    "partition",
    "account",
    "qos",
    "reservation",
    "constraint",
    "nodelist",
    "exclude",
    "exclusive",
    "gres",
    "gpus_per_node",
    "cpus_per_task",
    "mem",
    "dependency",
    "comment",
)
_OWN_OPTIONS = {key.replace("_", "-") for key in _DIRECTIVES} | {
    "job-name",
    "ntasks",
    "ntasks-per-node",
    "output",
    "error",
    "open-mode",
    "chdir",
    "wrap",
    "array",
    "export",
    "export-file",
    "test-only",
    "parsable",
}


def _own_key(option: str) -> str:
    key = "name" if option == "job-name" else option.replace("-", "_")
    return f": use the key {key}" if key in JobSpec.model_fields else ""
