"""What the job's processes run in: a container runtime, its image, and what of the host is seen inside.

The rules here are those of the runtimes' own argument readers. A runtime of a site's own, which is a template of its
own, has no such rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from slurmkit.config.section import AfterValidator, Field, Section, model_serializer, model_validator
from slurmkit.errors import Failure
from slurmkit.job.secrets import no_secret
from slurmkit.job.values import AbsolutePath, Line, Name, OptionWord

if TYPE_CHECKING:
    from slurmkit.job.spec import JobSpec

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
_REGISTRY = re.compile(r"([^/#]*[.:][^/#]*|localhost)/.+")
_ARCHIVE = re.compile(r"(?:docker-archive|oci-archive|oci|dir):(?://)?(/[^:]*)")
# What no path of a mount can hold. pyxis writes mounts into a line of bash for enroot, apptainer splits at some more.
_UNCARRIED = {"pyxis": ' :,"$`\\', "apptainer": ':,"\\^'}


def _reference(value: str) -> str:
    if re.match(r"[^/@\s]+:[^/@\s]+@", value):
        raise ValueError("holds a user and a password: keep them in the runtime's own file of credentials")
    if value.startswith(("./", "../", "~", "-")) or value != value.strip() or (" " in value and value[0] != "/"):
        raise ValueError(f"{value!r} is neither an absolute path nor an image's name")
    return value


class Mount(Section):
    """A folder or file of the host, seen inside. Written `src:dst`, `src:dst:ro`, or `src` for the same place."""

    source: str
    """Path on every node."""
    target: str
    """Path inside."""
    read_only: bool = False
    """Whether it can be written to from inside."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if isinstance(value, Mount):
            return value
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not a mount: write src:dst, src:dst:ro or src")
        no_secret(value)
        source, *rest = value.split(":")
        if len(rest) > 2 or rest[1:] not in ([], ["ro"], ["rw"]):
            raise ValueError(f"{value!r} is not a mount: write src:dst, src:dst:ro or src; no path can hold a colon")
        target = rest[0] if rest else source
        for path in (source, target):
            if not path.startswith("/") or not path.isprintable() or path != path.rstrip():
                raise ValueError(f"{value!r} is not a mount: {path!r} is not an absolute path in one printable line")
        if os.path.normpath(target) == "/":
            raise ValueError(f"{value!r} would be mounted over the whole image")
        return {"source": source, "target": os.path.normpath(target), "read_only": rest[1:] == ["ro"]}

    @model_serializer
    def __str__(self) -> str:
        return f"{self.source}:{self.target}" + (":ro" if self.read_only else "")


class Container(Section):
    """What the job's processes run in."""

    runtime: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")] = "none"
    """`none`: straight on the node. Each runtime is one file in templates/container/: pyxis, apptainer, podman."""
    image: Annotated[Line, AfterValidator(_reference)] | None = None
    """An absolute path, or a reference in the runtime's own form: docs/containers/."""
    mounts: tuple[Mount, ...] = ()
    """Beside the run directory, the job's workdir and /tmp: `src:dst`, `src:dst:ro`, or `src`."""
    workdir: AbsolutePath | None = None
    """Where the command starts, inside; by default the job's workdir, which is then mounted."""
    mount_home: bool = False
    """Whether the home directory is seen inside."""
    writable: bool = False
    """Whether the image's own files can be changed inside."""
    name: Name | None = None
    """Keep the container on its nodes under this name, and use it again; by default each job has a fresh one."""
    options: tuple[OptionWord, ...] = ()
    """Further options of the runtime, a word each: `--nvccli`, `--device=/dev/infiniband`, `--container-remap-root`."""
    check: tuple[Literal["image", "mounts", "runtime"], ...] = (
        "image",
        "mounts",
        "runtime",
    )
    """What must be there on the submitting host already; leave out what only compute nodes have."""

    @model_validator(mode="after")
    def _runtime_takes_it(self) -> Container:
        if self.runtime == "none":
            given = sorted(self.model_fields_set - {"runtime", "check"})
            given = [key for key in given if getattr(self, key) not in (None, False, ())]
            if given:
                raise ValueError(f"{' and '.join(given)} need a container: give runtime (pyxis, apptainer or podman)")
            return self
        if self.image is None:
            raise ValueError(f"image is missing: container.runtime {self.runtime} needs one")
        problem = _misread(self.runtime, self.image)
        if problem:
            raise ValueError(f"image {self.image!r}: {problem}")
        if self.name is not None and self.runtime in ("apptainer", "podman"):
            raise ValueError(
                f"name ({self.name}): {self.runtime} cannot start a kept container with another job's mounts; leave "
                "it out, and build what should stay into the image or mount a folder for it"
            )
        targets = [mount.target for mount in dict.fromkeys(self.mounts)]  # a site may add what a job already has
        twice = [target for target in targets if targets.count(target) > 1]
        if twice:
            raise ValueError(f"mounts: two of them at {twice[0]}")
        return self

    def binds(self, run_dir: str, workdir: str) -> tuple[Mount, ...]:
        """All mounts, a folder before what lies in it: the section's, /tmp, the run directory, the job's workdir.

        ValueError names a path that the runtime cannot carry.
        """
        found = {mount.target: mount for mount in self.mounts}
        if run_dir in found and (found[run_dir].source != run_dir or found[run_dir].read_only):
            raise ValueError(f"container.mounts: {found[run_dir]} would hide the run directory, which is mounted there")
        for path in ("/tmp", run_dir, *([workdir] if self.workdir is None else [])):
            found.setdefault(path, Mount.model_construct(source=path, target=path, read_only=False))
        for path in (path for mount in found.values() for path in (mount.source, mount.target)):
            bad = next((char for char in path if char in _UNCARRIED.get(self.runtime, ":")), None)
            if bad is not None:
                raise ValueError(f"container: {path!r} holds {bad!r}, which {self.runtime} cannot carry in a mount")
        return tuple(sorted(found.values(), key=lambda mount: mount.target.rstrip("/").count("/")))


def _misread(runtime: str, image: str) -> str | None:
    """Why the runtime would take this image for something else, and what would be right."""
    scheme, _, rest = image.rpartition("://")
    named = not image.startswith("/")
    if runtime == "pyxis" and named:
        if rest.endswith((".sqsh", ".squashfs")):
            return f"pyxis takes a file by its path: ./{rest} or an absolute one"
        if _REGISTRY.fullmatch(rest) and "#" not in rest:
            return f"pyxis would look for it on Docker Hub; write {rest.replace('/', '#', 1)}"
    elif runtime in ("apptainer", "podman") and named:
        if "#" in image:
            return f"the # is pyxis's; write {'docker://' if runtime == 'apptainer' else ''}{rest.replace('#', '/', 1)}"
        if runtime == "apptainer" and not scheme and not _ARCHIVE.fullmatch(image):
            return f"apptainer would take it for a file; write docker://{image}, or ./{image} for a file"
    if runtime == "podman" and ":" in image and not named:
        return "podman cannot carry the colon in a path"
    return None


def expand(text: str, environ: Mapping[str, str], directory: str) -> str:
    """A path or reference with `~`, `$NAME`, `${NAME}` and a leading `./` or `../` (of `directory`) written out.

    ValueError names a variable that is not set, or whose value holds a colon.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environ:
            raise ValueError(f"{text!r}: the variable {name} is not set")
        if ":" in environ[name]:
            raise ValueError(f"{text!r}: the value of {name} holds a colon")
        return environ[name]

    path = _VARIABLE.sub(value_of, "$HOME" + text[1:] if text == "~" or text.startswith("~/") else text)
    return os.path.normpath(os.path.join(directory, path)) if path.startswith(("./", "../")) else path


def expand_places(container: dict[str, Any], environ: Mapping[str, str], directory: str) -> dict[str, Any]:
    """A container section as written, with image and mounts expanded. What is not text is left for validation."""
    expanded = dict(container)
    if isinstance(container.get("image"), str):
        expanded["image"] = expand(container["image"], environ, directory)
    if isinstance(container.get("mounts"), list | tuple):
        expanded["mounts"] = [
            ":".join(expand(part, environ, directory) for part in mount.split(":")) if isinstance(mount, str) else mount
            for mount in container["mounts"]
        ]
    return expanded


def missing_parts(spec: JobSpec) -> list[tuple[str, str]]:
    """What of the job's container is not there on this host: dotted key, and message with the value."""
    container = spec.container
    missing: list[tuple[str, str]] = []
    if container.runtime == "none":
        return missing
    image = container.image or ""
    archive = _ARCHIVE.fullmatch(image)
    path = archive[1] if archive else image
    if "image" in container.check and path.startswith("/"):
        if not os.path.exists(path):
            missing.append(("container.image", f"{path}: no such file"))
        elif container.runtime == "podman" and not archive and not os.path.isdir(path):
            missing.append(("container.image", f"{path}: podman takes a folder with a root file system; write "
                            f"docker-archive:{path} or oci-archive:{path} for an image in a file"))  # fmt: skip
    if "mounts" in container.check:
        absent = [mount for mount in container.mounts if not os.path.exists(mount.source)]
        missing += [("container.mounts", f"{mount}: {mount.source}: no such file or folder") for mount in absent]
    problem = _runtime_is_missing(container.runtime) if "runtime" in container.check else None
    if problem:
        hint = "if compute nodes have it, take runtime out of container.check"
        missing.append(("container.runtime", f"{container.runtime}: {problem}; {hint}"))
    return missing


def _runtime_is_missing(runtime: str) -> str | None:
    import shutil

    if runtime == "pyxis":
        from slurmkit.slurm.command import has_pyxis

        try:
            return None if has_pyxis() else "srun on this host has no --container-image"
        except Failure as error:
            return f"srun cannot be asked: {error}"
    if runtime in ("apptainer", "podman") and shutil.which(runtime) is None:
        return "not on PATH on this host"
    return None
