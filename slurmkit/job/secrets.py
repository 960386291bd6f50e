"""Secrets: named in the spec, read at submission, carried only in the job's environment.

A value never stands in a script, an argument, a file or a message; one that somebody writes into a job is refused.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from slurmkit.config.section import AfterValidator, BeforeValidator, Section, model_serializer, model_validator
from slurmkit.errors import UserError
from slurmkit.job.reserved import reserved

# Seconds that a command may take: somebody may have to find a passphrase, or the key to touch.
_DEADLINE = 60.0
# Linux takes 128 KiB for one variable of an environment, its name included.
_BYTES = 100_000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Names whose value is one, and among them those that only look so: where a secret is, how many tokens, which token.
_SECRET_NAME = re.compile(
    r"^AWS_|API_?KEYS?|ACCESS_KEY|PRIVATE_KEY|(^|_)KEY$|TOKEN$|(^|_)TOKEN_|SECRET|PASSW(OR)?D|PASSPHRASE|_PWD$"
    r"|CREDENTIALS?$|_PAT$|_AUTH$|(^|_)(PASS|COOKIE|AUTH_HEADER)$|SSH_PRIVATE$"
)
_ONLY_LOOKS_SO = re.compile(
    r"_(PATH|FILE|DIR|HOME|URL|URI|ENDPOINT|MODE|TYPE|NAME|TTL|TIMEOUT|LIMIT|COUNT|SIZE|ID_FILE)$"
    r"|^AWS_(DEFAULT_)?(REGION|PROFILE|OUTPUT)$|^AWS_(EC2_METADATA_DISABLED|SDK_LOAD_CONFIG|STS_REGIONAL_ENDPOINTS)$"
    r"|^AWS_(MAX_ATTEMPTS|RETRY_MODE|CA_BUNDLE|PAGER)$|^GOOGLE_APPLICATION_CREDENTIALS$|_DISABLE_IMPLICIT_TOKEN$"
    r"|(^|_)(BOS|EOS|PAD|UNK|MASK|SEP|CLS|STOP|START|END|IMAGE|SPECIAL|PER|MAX|MIN|NUM)_TOKEN(_ID)?$|(^|_)TOKEN_IDS?$"
    r"|(^|_)(PUBLIC|PRIMARY|FOREIGN|SORT|CACHE|INDEX|PARTITION|METRIC|INPUT|OUTPUT|LABEL|PROMPT|ANSWER)_KEY$"
)
# Values that are one, whatever their name: the shapes that their issuers publish so that scanners find them.
_SECRET_VALUE = {
    kind: re.compile(rf"(?<![A-Za-z0-9_-])(?:{pattern})")
    for kind, pattern in {
        "a Hugging Face token (hf_…)": r"(?:hf|api_org)_[A-Za-z0-9]{20,}",
        "a W&B key (wandb_v1_…)": r"wandb_v\d_[A-Za-z0-9_]{20,}",
        "an API key (sk-…)": r"sk-(?:(?:proj|ant|or|svcacct|admin|lf)-[A-Za-z0-9_-]{16,}|[A-Za-z0-9]{20,})",
        "a GitHub token (ghp_…)": r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}",
        "a GitLab token (glpat-…)": r"glpat-[A-Za-z0-9_-]{20,}",
        "an NVIDIA key (nvapi-…)": r"nvapi-[A-Za-z0-9_-]{20,}",
        "an AWS key (AKIA…)": r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        "a Google key (AIza…)": r"AIza[A-Za-z0-9_-]{35}",
        "a Slack token (xox…)": r"xox[abeprs]-[A-Za-z0-9-]{10,}",
        "a signed token (eyJ….eyJ…)": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
        "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
        "a password in a URL (//user:password@host)": r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@$]*:[^\s/@$]+@",
    }.items()
}
# NAME=value with a value that stands there, in contrast to $VARIABLE or $(command).
_ASSIGNED = re.compile(r"(?<![\w$-])([A-Z][A-Z0-9_]*)=(?![\"']?[$`]|[\"']?[\s;]|[\"']{2}|[\"']?$)")

# Options and words before a value that may be a secret. A value that begins with $ is a variable's.
_EXPOSED = re.compile(
    r"(?<![\w-])(--?(?:token|api[-_]?key|password|passwd|secret)|curl .*?-u|wandb login|"
    r"(?:\w+_)?(?:api_?key|token|password|passwd|secret)(?==))[= ][\"']?(?![\"'$`-])\S",
    re.IGNORECASE,
)

_FORMS = "env, {env: VARIABLE}, {file: ~/FILE} or {command: pass show NAME}"


class SecretSource(Section):
    """Where a secret's value comes from when the job is submitted: one of the three."""

    env: str | None = None
    """A variable of the submitting environment."""
    file: str | None = None
    """A file of the user's (or root's) that nobody else may read: one line."""
    command: str | tuple[str, ...] | None = None
    """A command that prints it, such as `pass show hf`; it may ask on the terminal. No shell reads it."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_three(cls, data: Any) -> Any:
        # Here and not left to the types, whose messages show what was given: that may be the secret itself.
        if isinstance(data, SecretSource):
            return data
        given = {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else {}
        if not given or not given.keys() <= cls.model_fields.keys():
            raise ValueError(f"must say where the secret comes from, and never hold it: {_FORMS}")
        if len(given) > 1:
            raise ValueError(f"has {len(given)} sources, {' and '.join(given)}; give one")
        [(kind, where)] = given.items()
        words = where if kind == "command" and isinstance(where, list | tuple) else [where]
        if not words or not all(isinstance(word, str) and word and "\0" not in word for word in words):
            raise ValueError(f"{kind} must be text{' or a list of words' if kind == 'command' else ''}, and not empty")
        if any(kind_of_token(word) for word in words):
            raise ValueError(f"{kind} holds what looks like the secret itself; say where it comes from: {_FORMS}")
        if kind == "env" and not _NAME.fullmatch(where):
            raise ValueError(f"env must be the name of an environment variable: {_FORMS}")
        if kind == "file" and not where.startswith(("/", "~", "$")):
            raise ValueError("file must be an absolute path, or begin with ~ or a $VARIABLE")
        if kind == "command" and isinstance(where, str):
            try:
                empty = not shlex.split(where)
            except ValueError as error:
                raise ValueError(f"command cannot be read as words: {error}") from None
            if empty:
                raise ValueError("command must be text or a list of words, and not empty")
        return given

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}

    def __str__(self) -> str:
        if self.env is not None:
            return f"env {self.env}"
        if self.file is not None:
            return f"file {self.file}"
        return f"command {self.command if isinstance(self.command, str) else shlex.join(self.command or ())}"


def as_mapping(value: Any) -> Any:
    """The one form in which layers can merge: every name with all three kinds, those not given as None.

    `[A]` and `{A: env}` are {A: {env: A, file: None, command: None}}. Anything that is no source stays as it is.
    """
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value, "env")
    if not isinstance(value, dict):
        return value
    none = dict.fromkeys(SecretSource.model_fields)
    whole = {name: {"env": name} if source == "env" else source for name, source in value.items()}
    return {name: {**none, **source} if isinstance(source, dict) else source for name, source in whole.items()}


def _named(value: Any) -> Any:
    mapping = as_mapping(value)
    if not isinstance(mapping, dict):
        raise ValueError(f"must map names to where each comes from ({_FORMS}), or list names that the shell exports")
    for name in mapping:
        if not isinstance(name, str) or kind_of_token(name):
            raise ValueError("must name environment variables, and holds what looks like a secret itself")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name an environment variable")
    return mapping


def _free(name: str) -> str:
    if reason := reserved(name):
        raise ValueError(f"cannot be a secret: {name} {reason}")
    if name in ("HOME", "LD_PRELOAD"):
        raise ValueError("cannot be a secret: every program acts on it; set it under env")
    return name


Secrets = Annotated[dict[Annotated[str, AfterValidator(_free)], SecretSource], BeforeValidator(_named)]
"""A field's type: NAME -> source, or a plain list of names that are all taken from the submitting environment."""


def looks_secret(name: str) -> bool:
    """Whether an environment variable of this name is expected to hold a secret."""
    name = name.upper()
    return bool(_SECRET_NAME.search(name)) and not _ONLY_LOOKS_SO.search(name)


def kind_of_token(text: str) -> str | None:
    """What well-known kind of secret stands in a text, or None."""
    return next((kind for kind, pattern in _SECRET_VALUE.items() if pattern.search(text)), None)


def without_tokens(text: str) -> str:
    """Return the text with an ellipsis in place of every well-known kind of secret."""
    for pattern in _SECRET_VALUE.values():
        text = re.sub(pattern.pattern + r"[^\s'\"(),;]*", "…", text)
    return text


def looks_exposed(words: Sequence[str]) -> list[str]:
    """Return the options and words in a command or in shell lines that stand before what may be a secret."""
    return sorted({match[1] for match in _EXPOSED.finditer(" ".join(words))})


def no_secret_name(name: str) -> str:
    """A validator: a variable whose value the script would hold, and whose name says that it is a secret."""
    if looks_secret(name):
        raise ValueError(f"{name} looks like a secret, {_instead(name)}; on the command line, --secret {name}")
    return name


def no_secret(text: str) -> str:
    """A validator: text that the script would hold. ValueError names the kind of secret in it, and does not show it."""
    if kind := kind_of_token(text):
        raise ValueError(f"holds what looks like {kind}, {_instead('NAME')}")
    for name in _ASSIGNED.findall(text):
        if looks_secret(name):
            raise ValueError(f"gives {name} a value, {_instead(name)}")
    return text


def _instead(name: str) -> str:
    return (
        "and the script that would hold it is stored and shown. Name it under `secrets:` instead, and it is read when "
        f"the job is submitted: `{name}: env`, or {_FORMS.removeprefix('env, ')}"
    )


def refuse_tokens(data: Any, key: str = "") -> None:
    """`no_secret` for all texts of nested plain data; ValueError begins with the dotted key."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            refuse_tokens(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list | tuple):
        for value in data:
            refuse_tokens(value, key)
    elif isinstance(data, str):
        try:
            no_secret(data)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def read_secrets(secrets: Mapping[str, SecretSource], origin_of: Callable[[str], str]) -> dict[str, str]:
    """All values, at submission; commands run last. UserError names each that cannot be had, its source and origin."""
    values: dict[str, str] = {}
    problems: list[str] = []
    for name, source in sorted(secrets.items(), key=lambda item: item[1].command is not None):
        if problems and source.command is not None:
            break  # nobody types a passphrase for a job that is refused anyway
        try:
            values[name] = _clean(_read(source))
        except _Missing as missing:
            problems.append(f"secrets.{name}: {source}: {missing} ({origin_of(name)})")
    if problems:
        raise UserError("\n".join(problems))
    return values


class _Missing(Exception):
    """Why a secret cannot be had, in words that do not hold it."""


def _read(source: SecretSource) -> bytes:
    if source.env is not None:
        if source.env not in os.environ:
            raise _Missing(f"the environment of this command has no {source.env}; export it, or give another source")
        return os.environb[source.env.encode()]
    if source.file is not None:
        return _read_file(os.path.expanduser(os.path.expandvars(source.file)))
    command = source.command or ()
    return _output_of(shlex.split(command) if isinstance(command, str) else list(command))


def _read_file(path: str) -> bytes:
    try:
        # Not to wait for a writer, should it be a pipe. What is checked is what is read, whatever happens to the name.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _Missing(f"{path} is not a regular file")
            if found.st_uid not in (os.geteuid(), 0):
                raise _Missing(f"{path} belongs to user number {found.st_uid}, who could change it; it must be yours")
            if found.st_mode & 0o077:
                mode = stat.S_IMODE(found.st_mode)
                raise _Missing(f"{path} has mode {mode:04o}, so others may use it: chmod 600 {shlex.quote(path)}")
            return file.read(_BYTES + 1)
    except OSError as error:
        raise _Missing(f"{path} cannot be read: {error.strerror}") from None


def _output_of(command: list[str]) -> bytes:
    # In memory and not through a pipe, which a child that the command leaves behind would hold open. Standard input
    # and error stay the terminal's, where pass and op ask for a passphrase.
    with open(os.memfd_create("secret"), "r+b") as output:
        try:
            code = subprocess.call(command, stdout=output, timeout=_DEADLINE)
        except OSError as error:
            raise _Missing(f"{command[0]} cannot be started: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise _Missing(f"it did not end within {_DEADLINE:g} s") from None
        if code != 0:
            raise _Missing(f"it ended with exit code {code}")
        output.seek(0)
        return output.read(_BYTES + 1)


def _clean(value: bytes) -> str:
    value = value.removesuffix(b"\n").removesuffix(b"\r")
    if not value.strip():
        raise _Missing("it is empty")
    if len(value) > _BYTES:
        raise _Missing(f"it is longer than {_BYTES} bytes, which no environment variable can carry")
    if b"\n" in value or b"\r" in value or b"\0" in value:
        raise _Missing("it has more than one line, or a NUL byte; a secret is one line")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _Missing("it is not UTF-8 text") from None
