"""What the keys of a job may hold: text that survives a directive, a script and sbatch's own rules."""

from __future__ import annotations

import re
import shlex
from typing import Annotated

from slurmkit.config.section import AfterValidator, BeforeValidator
from slurmkit.job.reserved import reserved
from slurmkit.job.secrets import no_secret

# A name is also a folder's name and a word in file patterns, so it is kept plain.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_TIME = re.compile(
    r"(?P<d>\d+)-(?P<dh>\d{1,2})(?::(?P<dm>\d{1,2})(?::(?P<ds>\d{1,2}))?)?|(?P<plain>\d+(?::\d{1,2}){0,2})"
)
_MEMORY = re.compile(r"(\d+)([KMGTkmgt]?)")
# A type may begin with a digit (2080ti, 1g.5gb), but then Slurm requires a count: it reads gpu:2080ti as a number.
_TYPE = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_GRES_COUNT = re.compile(r"(\d+)([KMGTkmgt]?)")
_GRES_ITEM = rf"[A-Za-z_]\w*(?::[A-Za-z_][A-Za-z0-9_.+-]*|(?::{_TYPE})?:{_GRES_COUNT.pattern})?"
_GRES = re.compile(rf"{_GRES_ITEM}(?:,{_GRES_ITEM})*")
_GPUS_ITEM = rf"(?:{_TYPE}:)?\d+"
_GPUS = re.compile(rf"{_GPUS_ITEM}(?:,{_GPUS_ITEM})*")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIGNAL = re.compile(r"(?:R?B:|R:)?(?:[A-Z][A-Z0-9]*|\d+)(?:@\d+)?")
_ARRAY = re.compile(r"\d+(?:-\d+(?::\d+)?)?(?:,\d+(?:-\d+(?::\d+)?)?)*(?:%\d+)?")
_UMASK = re.compile(r"0{0,2}[0-7]{1,2}")
_MEGABYTES = {"K": 1 / 1024, "": 1.0, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
# Slurm reads each directive into a buffer of this many bytes, and cuts the rest off in silence.
_DIRECTIVE_BYTES = 8000


def minutes_of(time: str) -> float:
    """Minutes in a time as Slurm reads it: `30` is minutes, `1:30` is minutes and seconds, `1-12` is days and hours."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"{time!r} is not a Slurm time: minutes, h:mm:ss or d-hh:mm:ss")
    if match["plain"] is None:
        days, hours, minutes, seconds = (int(match[part] or 0) for part in ("d", "dh", "dm", "ds"))
        return days * 1440 + hours * 60 + minutes + seconds / 60
    parts = [int(part) for part in match["plain"].split(":")]
    if len(parts) == 3:
        return parts[0] * 60 + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0)


def megabytes_of(memory: str) -> float:
    """Megabytes in a size as Slurm reads it: `64G`; a number alone is megabytes."""
    match = _MEMORY.fullmatch(memory)
    if match is None:
        raise ValueError(f"{memory!r} is not a size such as 64G")
    return int(match[1]) * _MEGABYTES[match[2].upper()]


def gpus_of(request: str) -> int:
    """GPUs in a request by count, such as `8`, `h100:8` or `h100:4,a100:4`."""
    return sum(int(item.rpartition(":")[2]) for item in request.split(","))


def gpus_in_gres(gres: str) -> int:
    """GPUs per node in a GRES: `gpu:8`, `gpu:h100:4,gpu:a100:4`. Shards of a GPU and other resources are none."""
    total = 0
    for item in gres.split(","):
        kind, *rest = item.split(":")
        if kind == "gpu":
            count = _GRES_COUNT.fullmatch(rest[-1]) if rest else None
            total += int(count[1]) * 1024 ** " KMGT".index(count[2].upper() or " ") if count else 1
    return total


def jobs_in(array: str | None) -> int:
    """Jobs in an array such as `0-15:4,20%2`; 1 without an array."""
    count = 0
    for part in (array or "0").partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        count += len(range(int(first), int(last or first) + 1, int(step or 1) or 1))
    return count


def shell_word(value: str) -> str:
    """One word of bash that stands for exactly this text, and that sbatch lets pass: it refuses scripts with \\r\\n."""
    if "\r" not in value:
        return shlex.quote(value)
    return "$'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\r", "\\r") + "'"


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


def _interpreter(value: str) -> str:
    return _path(value) if "/" in value else _name(value)


def _option_word(value: str) -> str:
    if not re.fullmatch(r"-[A-Za-z].*|--[A-Za-z].*", value, re.DOTALL):
        raise ValueError(f"{value!r} is not an option in one word, such as --NAME or --NAME=VALUE")
    return value


def _environment_name(name: str) -> str:
    if not _ENVIRONMENT_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name an environment variable")
    if reason := reserved(name):
        raise ValueError(f"cannot be set: {name} {reason}")
    return name


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
Line = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_one_line), AfterValidator(no_secret)]
Word = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_no_nul), AfterValidator(no_secret)]
OptionWord = Annotated[Word, AfterValidator(_option_word)]
Name = Annotated[str, AfterValidator(_name), AfterValidator(no_secret)]
EnvironmentName = Annotated[str, AfterValidator(_environment_name)]
AbsolutePath = Annotated[str, AfterValidator(_path), AfterValidator(no_secret)]
Interpreter = Annotated[str, AfterValidator(_interpreter)]
Time = Annotated[Line, _matching(_TIME, "a Slurm time: minutes, h:mm:ss or d-hh:mm:ss")]
Memory = Annotated[Line, _matching(_MEMORY, "a size such as 64G")]
Gres = Annotated[Line, _matching(_GRES, "a GRES such as gpu:8, gpu:h100:8 or gpu:2080ti:1")]
Gpus = Annotated[Line, _matching(_GPUS, "a count or TYPE:COUNT, such as 8 or h100:8")]
Signal = Annotated[Line, _matching(_SIGNAL, "a signal for sbatch, such as B:USR2@300")]
# `umask: 027` is the number 27 in YAML, and means the same.
Umask = Annotated[Line, _matching(_UMASK, "octal and 077 at most, such as 077 or 027")]
Array = Annotated[Line, _matching(_ARRAY, "an array such as 0-7 or 1,5,9%2")]
