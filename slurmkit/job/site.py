"""A site's own file: its defaults, and the rules that a job must keep. Every refusal names the rule's file and line."""

from __future__ import annotations

import fnmatch
import math
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from slurmkit.config.section import Field, Section
from slurmkit.config.source import Key, Source, merge, parse_yaml, put, read_text
from slurmkit.config.validate import known_keys, nearest, origin_of, shown, validate
from slurmkit.errors import UserError
from slurmkit.job.container import Mount, expand_places
from slurmkit.job.layers import EXTRA_KEYS, absolute, anchor_paths
from slurmkit.job.site_options import counted_gpus, mounting_options, option_refusals
from slurmkit.job.spec import JobSpec
from slurmkit.job.values import Word, gpus_in_gres, gpus_of, megabytes_of, minutes_of

Names = tuple[str, ...]
Lines = tuple[Word, ...]
# What a limit may also speak of: figures that follow from several keys.
_DERIVED = ("total_gpus", "gpu_hours")


class Limit(Section):
    """Bounds of a key's value. Times, sizes and GPU counts are compared as quantities, not as text."""

    min: int | float | str | None = None
    """At least this."""
    max: int | float | str | None = None
    """At most this."""
    allowed: tuple[int | float | bool | str, ...] | None = None
    """One of these."""
    pattern: str | None = None
    """A regular expression that the whole value must match."""


class Rules(Section):
    """Rules for everybody, or for one partition."""

    defaults: dict[str, Any] = {}
    """Keys of a job, as in a project's file; the weakest layer."""
    lock: Names = ()
    """Keys that keep the value of `defaults`, or stay unset, whatever a project, a user or a flag says."""
    require: Names = ()
    """Keys that every job must give."""
    limits: dict[str, Limit] = {}
    """Key by key, what its value may be; also of total_gpus and gpu_hours."""


class Forbid(Section):
    """Variables and mounts that no job may set."""

    env: Names = ()
    """Names of environment variables, with * and ?."""
    mounts: Names = ()
    """Host folders of which nothing may be mounted, nor what lies above them."""


class Add(Section):
    """Settings that every job gets."""

    env: dict[str, Word] = {}
    """Environment variables; a job cannot set them otherwise."""
    mounts: Names = ()
    """Container mounts, beside the job's own."""
    prologue: Lines = ()
    """Shell lines on every node, before the job's `setup`."""
    epilogue: Lines = ()
    """Shell lines on the first node, after the job's `epilogue`."""


class Price(Section):
    """Prices for `slurmkit usage`."""

    per_gpu_hour: Annotated[float, Field(ge=0)] = 0.0
    """For each GPU that a job has."""
    per_node_hour: Annotated[float, Field(ge=0)] = 0.0
    """For each of its nodes."""
    currency: Word
    """Such as EUR."""


class SiteFile(Rules):
    """The whole of a site's file."""

    partitions: dict[str, Rules] = {}
    """Defaults and rules of one partition, beside those for everybody."""
    forbid: Forbid = Forbid()
    """What no job may bring."""
    add: Add = Add()
    """What every job gets."""
    profiles: dict[str, dict[str, Any]] = {}
    """Named sets of keys, chosen with --profile."""
    templates: str | None = None
    """A folder of templates that extend or replace ours, relative to this file."""
    require_committed: bool = False
    """Only rendered files that are committed to git can be submitted."""
    price: Price | None = None
    """What jobs cost."""


@dataclass(frozen=True, slots=True)
class Site:
    """A site's file as it was read."""

    path: Path
    rules: SiteFile
    source: Source

    def defaults(self, partition: str | None) -> Source:
        """The site's defaults, with those of a job's (first) partition over them."""
        chosen = (partition or "").partition(",")[0]
        parts = [_below(self.source, ("defaults",))]
        if chosen in self.rules.partitions:
            parts.append(_below(self.source, ("partitions", chosen, "defaults")))
        return merge(parts)

    def rule_sets(self, partition: str | None) -> Iterator[tuple[Key, Rules, str]]:
        """The rules that hold for a job: where they stand, they themselves, and for whom they are."""
        yield (), self.rules, ""
        for name in (partition or "").split(","):
            if name in self.rules.partitions:
                yield ("partitions", name), self.rules.partitions[name], f" for partition {name}"

    def place(self, *key: str) -> str:
        """File and line of a rule."""
        return origin_of(self.source, key) or "the site's file"

    def add_to(self, source: Source) -> Iterator[str]:
        """Put what the site adds into `source`. Yields a refusal for each variable that the job sets otherwise."""
        add = self.rules.add
        for name, value in add.env.items():
            own = _get(source.data, f"env.{name}")
            if own is not None and str(own) != value:
                yield (
                    f"env.{name}: {own!r} ({origin_of(source, ('env', name))}) cannot be set: the site sets it to "
                    f"{value!r} ({self.place('add', 'env', name)})"
                )
            put(source, ("env", name), value, self.place("add", "env", name))
        for key, inner in (("prologue", "prologue"), ("epilogue", "epilogue"), ("mounts", "container.mounts")):
            added = self._added_mounts() if key == "mounts" else getattr(add, key)
            if not added or (key == "mounts" and _get(source.data, "container.runtime") in (None, "none")):
                continue
            own = _get(source.data, inner) or []
            place = origin_of(source, tuple(inner.split("."))) if own else None
            place = f"{place} and {self.place('add', key)}" if place else self.place("add", key)
            put(source, tuple(inner.split(".")), [*own, *added], place)

    def locks_and_requirements(self, merged: Source) -> Iterator[str]:
        """A refusal for each locked key that another layer changed, and for each required one that none gives."""
        yield from self.locks(merged)
        yield from self.requirements(merged)

    def requirements(self, merged: Source) -> Iterator[str]:
        """Yield a refusal for each required key that no layer gives."""
        for prefix, rules, whom in self.rule_sets(merged.data.get("partition")):
            for index, key in enumerate(rules.require):
                if _get(merged.data, key) is None:
                    place = self.place(*prefix, "require", str(index))
                    yield f"{key} must be given{whom}: the site requires it ({place})"

    def locks(self, merged: Source) -> Iterator[str]:
        """Yield a refusal for each locked key that another layer changed."""
        partition = merged.data.get("partition")
        defaults = self.defaults(partition).data
        for prefix, rules, whom in self.rule_sets(partition):
            for index, key in enumerate(rules.lock):
                wanted, asked = _get(defaults, key), _get(merged.data, key)
                if _plain(asked) != _plain(wanted):
                    to = f" to {shown(wanted)}" if wanted is not None else ""
                    origin = origin_of(merged, tuple(key.split(".")))
                    where = f" ({origin})" if origin else ""
                    given = (
                        f"{key}{where} cannot be left out"
                        if asked is None
                        else f"{key}: {shown(asked)}{where} cannot be set"
                    )
                    yield f"{given}: the site locks it{to}{whom} ({self.place(*prefix, 'lock', str(index))})"

    def refusals(self, spec: JobSpec, source: Source) -> Iterator[str]:
        """A refusal for each limit that a job breaks, and for each forbidden variable."""
        yield from _limit_refusals(self, spec, source)
        yield from option_refusals(self, spec, source)
        if spec.container.runtime != "none":
            yield from self._forbidden_mounts(spec, source)
            yield from mounting_options(self, spec, source)
        own_env = [("env", name) for name in spec.env if name not in self.rules.add.env]
        for index, pattern in enumerate(self.rules.forbid.env):
            for key in (*own_env, *(("secrets", name) for name in spec.secrets)):
                if fnmatch.fnmatchcase(key[1], pattern):
                    yield (
                        f"{'.'.join(key)} ({origin_of(source, key)}) cannot be set: the site forbids {pattern} "
                        f"({self.place('forbid', 'env', str(index))})"
                    )

    def _forbidden_mounts(self, spec: JobSpec, source: Source) -> Iterator[str]:
        added = {"/tmp", *(Mount.model_validate(text).source for text in self._added_mounts())}
        origin = origin_of(source, ("container", "mounts"))
        implicit = {spec.run_dir: "the run directory", spec.workdir: "workdir"}
        mounted = [
            ("container.mounts", mount.source, implicit.get(mount.source, origin))
            for mount in spec.container.binds(spec.run_dir, spec.workdir)
            if mount.source not in added
        ]
        if spec.container.mount_home:
            homes = {pwd.getpwuid(os.getuid()).pw_dir, os.path.expanduser("~"), spec.env.get("HOME", "/tmp")}
            place = origin_of(source, ("container", "mount_home"))
            mounted += [("container.mount_home", home, place) for home in sorted(homes - {"/tmp"})]
        for index, folder in enumerate(self.rules.forbid.mounts):
            forbidden = os.path.realpath(os.path.expanduser(os.path.expandvars(folder)))
            for key, path, place in mounted:
                real = os.path.realpath(path)
                if os.path.commonpath([real, forbidden]) in (real, forbidden):
                    yield (
                        f"{key}: {path} ({place}) cannot be mounted: the site forbids {folder} "
                        f"({self.place('forbid', 'mounts', str(index))})"
                    )

    def _added_mounts(self) -> list[str]:
        written = {"mounts": list(self.rules.add.mounts)}
        try:
            expanded: list[str] = expand_places(written, os.environ, str(self.path.absolute().parent))["mounts"]
        except ValueError as error:
            raise UserError(f"add.mounts: {error} ({self.place('add', 'mounts')})") from None
        return expanded

    @property
    def templates(self) -> Path | None:
        """The site's folder of templates."""
        if self.rules.templates is None:
            return None
        return Path(absolute(self.rules.templates, self.path.absolute().parent))


def read_site(path: Path) -> Site:
    """Read and check a site's file. UserError lists all that is wrong with it."""
    return _checked(path, path.absolute().parent, read_text(path))


@lru_cache(maxsize=8)
def _checked(path: Path, folder: Path, text: str) -> Site:
    """Return the site of a file whose text is `text`. Cached, as all jobs of a sweep need it."""
    source = parse_yaml(path, text)
    rules = validate(SiteFile, source)
    for data in [rules.defaults, *(part.defaults for part in rules.partitions.values()), *rules.profiles.values()]:
        anchor_paths(data, folder, str(path))
    site = Site(path, rules, Source(rules.model_dump(), source.origins))
    # Only whole rules can be held against the site's own defaults.
    problems = list(_problems(site)) or [
        problem for partition in (None, *rules.partitions) for problem in _bad_defaults(site, partition)
    ]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return site


def _below(source: Source, prefix: Key) -> Source:
    data: Any = source.data
    for part in prefix:
        data = data.get(part) or {}
    depth = len(prefix)
    origins = {key[depth:]: place for key, place in source.origins.items() if key[:depth] == prefix and key != prefix}
    return merge([Source(data, origins)])


def _problems(site: Site) -> Iterator[str]:
    """Yield the problems of a site's file that its schema does not find."""
    keys = [*known_keys(JobSpec), *(key for key in EXTRA_KEYS if key != "profiles")]
    maps = tuple(f"{key}." for key in ("env", "sbatch", "secrets"))
    for partition in (None, *site.rules.partitions):
        for prefix, rules, _ in list(site.rule_sets(partition))[(partition is not None) :]:
            named = [(("lock", str(index)), key) for index, key in enumerate(rules.lock)]
            named += [(("require", str(index)), key) for index, key in enumerate(rules.require)]
            named += [(("limits", key), key) for key in rules.limits if key not in _DERIVED]
            for rule, key in named:
                if key not in keys and not key.startswith(maps):
                    hint = nearest(key, keys)
                    yield (
                        f"{rule[0]}: {key} is no key of a job ({site.place(*prefix, *rule)})"
                        + (f"; the nearest is {hint}" if hint else "")
                    )
            for key, limit in rules.limits.items():
                yield from _broken_limit(key, limit, site.place(*prefix, "limits", key))


def _broken_limit(key: str, limit: Limit, place: str) -> Iterator[str]:
    if limit == Limit():
        yield f"limits.{key}: says nothing: give min, max, allowed or pattern ({place})"
    for name in ("min", "max"):
        bound = getattr(limit, name)
        if bound is not None:
            try:
                _measure(key, bound)
            except ValueError as error:
                yield f"limits.{key}.{name}: {bound!r} cannot be compared with: {error} ({place})"
    if limit.pattern is not None:
        try:
            re.compile(limit.pattern)
        except re.error as error:
            yield f"limits.{key}.pattern: {limit.pattern!r} is not a regular expression: {error} ({place})"


def _bad_defaults(site: Site, partition: str | None) -> Iterator[str]:
    source = site.defaults(partition)
    for key in EXTRA_KEYS:
        source.data.pop(key, None)
    for key, value in (("name", "x"), ("python", "x"), ("workdir", "/x"), ("run_dir", "/x"), ("command", ["x"])):
        if key not in source.data:
            put(source, (key,), value, "lint")
    source.data.setdefault("partition", partition)
    try:
        spec = validate(JobSpec, source)
    except UserError as error:
        yield from str(error).splitlines()
        return
    yield from _limit_refusals(site, spec, source)


def _limit_refusals(site: Site, spec: JobSpec, source: Source) -> Iterator[str]:
    settled = spec.model_dump(mode="json")
    gpus = counted_gpus(site, spec, source)
    for prefix, rules, whom in site.rule_sets(spec.partition):
        for key, limit in rules.limits.items():
            place = site.place(*prefix, "limits", key)
            value: Any
            if key in _DERIVED:
                if isinstance(gpus, str):
                    yield f"{key} cannot be counted: {gpus}; the site limits it{whom} ({place})"
                    continue
                value = gpus if key == "total_gpus" else spec.gpu_hours(gpus)
            else:
                value = _get(settled, key)
            if value is None or value == "":
                continue
            origin = origin_of(source, tuple(key.split("."))) if key not in _DERIVED else _counted(key, spec, source)
            what = f"{key}: {shown(value)}" + (f" ({origin})" if origin else "")
            for item in _items(key, value):
                why = _breaks(key, item, limit)
                if why:
                    yield f"{what} {why}{whom}, by the site's rule ({place})"
                    break


def _counted(key: str, spec: JobSpec, source: Source) -> str:
    """Return the keys from which a figure follows, each with its value and its place."""
    keys = ["nodes", "gres", "gpus", "gpus_per_node", "exclusive", *(("time", "array") if key == "gpu_hours" else ())]
    given = [name for name in keys if getattr(spec, name) not in (None, False)]
    return "; ".join(f"{name} {getattr(spec, name)}, {origin_of(source, (name,)) or 'default'}" for name in given)


def _items(key: str, value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return value.split(",") if key == "partition" else [value]


def _breaks(key: str, value: Any, limit: Limit) -> str | None:
    for bound, name, wrong in ((limit.min, "minimum", -1), (limit.max, "maximum", 1)):
        if bound is not None:
            have, edge = _measure(key, value), _measure(key, bound, bound=True)
            if (have - edge) * wrong > 0:
                return f"is {'below' if wrong < 0 else 'above'} the {name} of {bound}"
    if limit.allowed is not None and str(value) not in [str(item) for item in limit.allowed]:
        return f"is not one of {', '.join(str(item) for item in limit.allowed)}"
    if limit.pattern is not None and not re.fullmatch(limit.pattern, str(value)):
        return f"does not match the pattern {limit.pattern}"
    return None


def _measure(key: str, value: Any, bound: bool = False) -> float:
    """A value as a number that can be compared. ValueError if it is none."""
    if key in ("time", "time_min"):
        return minutes_of(str(value)) or (0 if bound else math.inf)  # 0 asks Slurm for no limit
    if key.startswith("mem"):
        return megabytes_of(str(value)) or (0 if bound else math.inf)  # 0 asks Slurm for all there is
    if key == "gres":
        return gpus_in_gres(str(value)) if not str(value).isdigit() else int(value)
    if key in ("gpus", "gpus_per_node"):
        return gpus_of(str(value))
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _get(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if type(value) is int else value
