"""From all layers to one JobSpec, with the origin of every value and every rule of the site kept."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slurmkit.config.source import Source, leaves, merge, put
from slurmkit.config.validate import origin_of, validate
from slurmkit.errors import UserError
from slurmkit.job.layers import Layer, absolute, anchor_paths, profile_layer, read_layers, site_file
from slurmkit.job.secrets import as_mapping, read_secrets
from slurmkit.job.spec import JobSpec
from slurmkit.job.syntax import faults_in_lines

if TYPE_CHECKING:
    from slurmkit.config.schema import TrainConfig
    from slurmkit.job.site import Site

_FILE = re.compile(r"(.+):\d+")


class Request(NamedTuple):
    """What a user asked for on the command line, as typed.

    Example: Request(run_file=None, config=Path("examples/grpo_arithmetic.yaml"), overrides=("grpo.seed=2",),
    command=(), flags={"nodes": 2}, profile=None).
    """

    run_file: Path | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    flags: Mapping[str, Any] = {}
    profile: str | None = None
    partial: bool = False
    """Settle also where nothing says yet what runs."""
    local: bool = False
    """It runs here, without Slurm."""
    resume: str | None = None
    """In place of the training configuration's checkpointing.resume."""


class Settled(NamedTuple):
    """A job that is ready to be rendered."""

    spec: JobSpec
    origins: dict[str, str]
    """Where each dotted key of the spec was set: a file and line, a flag, a variable, or `default`."""

    templates: tuple[Path, ...] = ()
    """Folders of templates before the packaged ones, strongest first."""

    sources: tuple[Path, ...] = ()
    """Every file that was read on the way."""

    train: TrainConfig | None = None
    """The training configuration, where slurmkit's own trainer runs."""

    config_origins: dict[str, str] = {}
    """Where each dotted key of the training configuration was set; a key that is not here has its default."""

    committed_only: str | None = None
    """The site's rule that only committed files can be submitted, where it has one."""

    site: Path | None = None
    """The site's file."""

    missing: tuple[str, ...] = ()
    """Refusals for keys that the site requires and nothing gives; only a partial request is settled with some."""

    @property
    def identity(self) -> dict[str, str]:
        """What makes two submissions attempts of the same run: the digest of what runs."""
        kind, text = "command", "\0".join(self.spec.command)
        if self.spec.config is not None:
            kind, text = "training configuration", self.spec.config
        return {kind: hashlib.sha256(text.encode()).hexdigest()}

    def as_json(self) -> dict[str, Any]:
        """The whole job as plain data, with the place that each value comes from."""
        spec = self.spec.model_dump(mode="json", exclude={"config"})
        result = {
            "spec": spec,
            "origins": {key: self.origins.get(key, "default") for key, _ in leaves(spec)},
            "templates": [str(folder) for folder in self.templates],
            "sources": [str(path) for path in self.sources],
            "site": None if self.site is None else str(self.site),
        }
        if self.train is not None:
            train = self.train.model_dump(mode="json")
            result["config"] = train
            result["config_origins"] = {key: self.config_origins.get(key, "default") for key, _ in leaves(train)}
        return result

    def read_secrets(self) -> dict[str, str]:
        """The job's secrets, from where the spec says they are. UserError names each that cannot be had."""
        return read_secrets(self.spec.secrets, self._origin_of_secret)

    def _origin_of_secret(self, name: str) -> str:
        return next((at for key, at in self.origins.items() if key.startswith(f"secrets.{name}.")), "default")


def settle(request: Request, directory: Path, environ: Mapping[str, str] = os.environ) -> Settled:
    """Lay the layers over each other, fill in what follows from others, and enforce the site's rules.

    Paths in flags are relative to `directory`, paths in a file to the file. Changes nothing on disk. UserError names
    key, value and origin, and for a site's rule its file and line.
    """
    site = _site(environ)
    missing: tuple[str, ...] = ()
    layers = list(_layers(request, directory, environ, site))
    requested = _lay(layers)
    source = _over_site(site, requested)
    if site is not None:
        missing = tuple(site.requirements(source))
        _refuse([*site.locks(source), *(() if request.partial else missing), *site.add_to(source)])
    folders = _take_folders(source, site, directory)
    results_dir = _take_path(source, "results_dir", directory) or directory / "results"
    in_file = _take_path(source, "config", directory)
    config = request.config or in_file
    overrides = (*_take_list(source, "overrides"), *request.overrides)
    if config is None and source.data.get("command") is None:
        if request.partial:
            put(source, ("command",), ["true"], "nothing says yet what runs")
        else:
            raise UserError(
                "nothing to run: give --config FILE for slurmkit's trainer, or a command of your own after --"
            )
    if overrides and config is None:
        raise UserError(f"{overrides[0]!r} overrides a training configuration: give one with --config FILE")
    if request.resume is not None and config is None:
        raise UserError(
            f"--resume {request.resume} says where slurmkit's trainer goes on, and this job runs a command of its own: "
            "say it in the command"
        )
    _fill_in(source, request, config, directory, results_dir)
    train: TrainConfig | None = None
    config_origins: dict[str, str] = {}
    if config is not None:
        from slurmkit.job.training import settle_training

        train, config_origins = settle_training(config, overrides, source, request, directory)
        if "watchdog" not in source.data:
            put(source, ("watchdog",), 60, "default of a training configuration")
    spec = validate(JobSpec, source)
    if spec.signal is None and spec.default_signal is not None:
        put(source, ("signal",), spec.default_signal, "until_done and time")
        spec = validate(JobSpec, source)
    if site is not None:
        _refuse(site.refusals(spec, source))
        if any(folder != site.templates for folder in folders):
            from slurmkit.job.site_templates import template_refusals

            _refuse(template_refusals(site, spec, source, folders))
    _refuse(faults_in_lines(spec, source))
    in_layers = [None if site is None else site.path, *(layer.path for layer in layers)]
    files = [path for path in in_layers if path is not None]
    files += map(Path, sorted({match[1] for place in config_origins.values() if (match := _FILE.fullmatch(place))}))
    return Settled(
        spec,
        {key: origin_of(source, tuple(key.split("."))) or "default" for key, _ in leaves(spec.model_dump(mode="json"))},
        folders,
        tuple(dict.fromkeys(path.absolute() for path in files)),
        train,
        config_origins,
        site.place("require_committed") if site is not None and site.rules.require_committed else None,
        None if site is None else site.path.absolute(),
        missing,
    )


def _site(environ: Mapping[str, str]) -> Site | None:
    path = site_file(environ)
    if path is None:
        return None
    from slurmkit.job.site import read_site

    return read_site(path)


def _refuse(problems: Iterable[str]) -> None:
    lines = list(dict.fromkeys(problems))
    if lines:
        raise UserError("\n".join(lines))


def _layers(request: Request, directory: Path, environ: Mapping[str, str], site: Site | None) -> Iterator[Layer]:
    """All layers above the site, weakest first."""
    if request.run_file is not None and request.run_file.suffix == ".sbatch":
        raise UserError(
            f"{request.run_file} is a rendered file: slurmkit submit takes it as it is, and nothing else does"
        )
    found = list(read_layers(request.run_file, directory, environ))
    named = [(layer.source.data.get("profile"), layer.source.origins.get(("profile",))) for layer in found]
    named += [(environ.get("SLURMKIT_PROFILE"), "environment: SLURMKIT_PROFILE"), (request.profile, "--profile")]
    chosen = [(name, origin) for name, origin in named if name]
    profile = None
    if chosen:
        of_site = [Layer("site", None, site.source)] if site is not None else []
        name, origin = chosen[-1]
        if not isinstance(name, str):
            raise UserError(f"profile: {name!r} is not a name ({origin})")
        profile = profile_layer(name, str(origin), [*of_site, *found])
    for layer in found:
        if layer.name in ("run file", "environment") and profile is not None:
            yield profile
            profile = None
        yield layer
    if profile is not None:
        yield profile
    flags = Source({}, {})
    for name, value in request.flags.items():
        put(flags, tuple(name.split(".")), value, f"command line: {name}")
    if request.command:
        put(flags, ("command",), list(request.command), "command line")
    if request.config is not None:
        put(flags, ("config",), str(request.config), "command line: config")
    anchor_paths(flags.data, directory, "command line")
    yield Layer("command line", None, flags)


def _lay(layers: Sequence[Layer]) -> Source:
    """Merge, where the strongest layer that says what runs, a configuration or a command, is the one that counts."""
    merged = Source({}, {})
    for layer in layers:
        data = layer.source.data
        if "prologue" in data:
            raise UserError(f"prologue ({layer.source.origins[('prologue',)]}) is the site's to set: write setup")
        if data.get("config") is not None and data.get("command") is not None:
            where = "--config and a command after --" if layer.path is None else f"{layer.path}: config and command"
            raise UserError(f"{where} exclude each other: config runs slurmkit's trainer")
        below = ("config", "overrides") if data.get("command") is not None else ("command", "overrides")
        if data.get("config") is not None or data.get("command") is not None:
            for key in below:
                merged.data.pop(key, None)
        merged = merge([merged, _with_named_secrets(layer.source)])
    for key in ("profile", "profiles"):
        merged.data.pop(key, None)
    return merged


def _with_named_secrets(source: Source) -> Source:
    """A stronger layer's source of a secret takes the place of a weaker one's, of another kind too."""
    if "secrets" not in source.data:
        return source
    return Source({**source.data, "secrets": as_mapping(source.data["secrets"])}, source.origins)


def _over_site(site: Site | None, requested: Source) -> Source:
    """The request over the site's defaults for its partition. A null takes an entry of a mapping out again."""
    if site is None:
        source = requested
    else:
        partition = requested.data.get("partition", site.rules.defaults.get("partition"))
        defaults = site.defaults(partition if isinstance(partition, str) else None)
        source = merge([_with_named_secrets(defaults), requested])
        if requested.data.get("command") is not None:
            source.data.pop("config", None)
    for key in ("env", "sbatch", "secrets"):
        entries = source.data.get(key)
        if isinstance(entries, dict):
            source.data[key] = {name: value for name, value in entries.items() if value is not None}
    return source


def template_folders(request: Request, directory: Path, environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """The folders of templates that a job submitted from here is rendered from, strongest first, without our own."""
    site = _site(environ)
    requested = _lay(list(_layers(request, directory, environ, site)))
    return _take_folders(_over_site(site, requested), site, directory)


def _take_folders(source: Source, site: Site | None, directory: Path) -> tuple[Path, ...]:
    templates = _take_path(source, "templates", directory)
    folders = [path for path in (templates, None if site is None else site.templates) if path is not None]
    for path in folders:
        if not path.is_dir():
            raise UserError(f"templates: {path}: no such folder")
    return tuple(dict.fromkeys(folders))


def _take_path(source: Source, key: str, directory: Path) -> Path | None:
    value = source.data.pop(key, None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{key}: {value!r} is not a path ({origin_of(source, (key,))})")
    return Path(absolute(value, directory))


def _take_list(source: Source, key: str) -> Sequence[str]:
    value = source.data.pop(key, None) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{key}: must be a list of key=value, not {value!r} ({origin_of(source, (key,))})")
    return value


def _fill_in(source: Source, request: Request, config: Path | None, directory: Path, results_dir: Path) -> None:
    """What nobody gave and follows from the rest."""
    data = source.data
    container = data.get("container")
    inside = isinstance(container, dict) and container.get("runtime", "none") != "none"
    for key, value in (
        ("name", _default_name(config, request, data)),
        # The submitting interpreter; inside a container only the image knows where its own is.
        ("python", "python3" if inside else _interpreter()),
        ("workdir", str(directory)),
    ):
        if data.get(key) is None:
            put(source, (key,), value, "default")
    if data.get("run_dir") is None:
        put(source, ("run_dir",), str(results_dir / str(data["name"])), "results_dir and name")


def _interpreter() -> str:
    """This interpreter by its plainest name: a script's first line and a shell call the same one differently."""
    plain = os.path.join(os.path.dirname(sys.executable), "python3")
    return plain if os.path.realpath(plain) == os.path.realpath(sys.executable) else sys.executable


def _default_name(config: Path | None, request: Request, data: Mapping[str, Any]) -> str:
    """After the file that says what runs, in the characters that a name may have."""
    if config is not None:
        name = config.stem
    elif request.run_file is not None:
        name = request.run_file.stem
    else:
        command = data["command"]
        name = os.path.basename(str(command[0])) if isinstance(command, list) and command else ""
    return re.sub(r"^[._+-]+|-+$", "", re.sub(r"[^A-Za-z0-9._+-]+", "-", name))[:100] or "run"
