"""The #SBATCH lines that a project's templates add, change or leave out, under the site's rules for a job's keys."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slurmkit.config.source import Source, put
from slurmkit.config.validate import validate
from slurmkit.errors import UserError
from slurmkit.job.render import render
from slurmkit.job.spec import DIRECTIVES, OWN_OPTIONS, JobSpec
from slurmkit.job.trace import render_traced

if TYPE_CHECKING:
    from slurmkit.job.site import Site

# https://slurm.schedmd.com/sbatch.html: the letters of the options.
_LETTERS = (
    "a=array A=account b=begin B=extra-node-info c=cpus-per-task C=constraint d=dependency D=chdir e=error F=nodefile "
    "G=gpus H=hold i=input J=job-name k=no-kill L=licenses m=distribution M=clusters n=ntasks N=nodes o=output "
    "O=overcommit p=partition q=qos Q=quiet s=oversubscribe S=core-spec t=time v=verbose w=nodelist W=wait x=exclude"
)
_LONG = dict(each.split("=") for each in _LETTERS.split())
_KEYS = {key.replace("_", "-"): key for key in DIRECTIVES} | {"job-name": "name"}


class Directive(NamedTuple):
    """An option of sbatch in a script. Example: Directive("nodes", "3", 7); without a value it is True."""

    option: str
    value: str | bool
    line: int


def template_refusals(site: Site, spec: JobSpec, source: Source, folders: tuple[Path, ...]) -> Iterator[str]:
    """Yield a refusal for each rule of the site that the #SBATCH lines of templates not the site's own break."""
    own = tuple(folder for folder in folders if folder == site.templates)
    if len(own) == len(folders):
        return
    traced = render_traced(spec, folders)
    by_site = {each.option: each.value for each in directives_in(render(spec, own))}
    changed = Source(copy.deepcopy(source.data), dict(source.origins))
    try:
        given = {each.option: each for each in directives_in(traced.script)}  # sbatch takes the last one
    except _Unreadable as error:
        file, _ = traced.place(error.line)
        yield f"templates: {file}: {error}: the site's rules cannot be held against it"
        return
    for option, directive in given.items():
        if by_site.get(option) != directive.value:
            file, _ = traced.place(directive.line)
            _put(changed, option, directive.value, f"{file}: a #SBATCH line")
    for option in by_site.keys() - given.keys():
        _put(changed, option, None, f"{folders[0]}: a template leaves out #SBATCH --{option}")
    try:
        keys = {key: value for key, value in changed.data.items() if key in JobSpec.model_fields}
        result = validate(JobSpec, Source(keys, changed.origins))
    except UserError as error:
        yield from str(error).splitlines()
        return
    before = {*site.locks_and_requirements(source), *site.refusals(spec, source)}
    after = [*site.locks_and_requirements(changed), *site.refusals(result, changed)]
    yield from (refusal for refusal in after if refusal not in before)


def _put(source: Source, option: str, value: str | bool | None, origin: str) -> None:
    if option == "no-requeue":
        return _put(source, "requeue", None if value is None else False, origin)
    key = _KEYS.get(option)
    if key is None:
        if option not in OWN_OPTIONS:
            put(source, ("sbatch", option), False if value is None else value, origin)
        return None
    number: Any = (
        int(value) if isinstance(value, str) and value.isdigit() and key.startswith(("nodes", "cpus")) else value
    )
    if number is None and key in ("name", "nodes"):
        number = 1 if key == "nodes" else source.data["name"]
    put(source, (key,), number, origin)
    return None


class _Unreadable(ValueError):
    def __init__(self, text: str, line: int) -> None:
        super().__init__(f"{text!r} is not #SBATCH --OPTION=VALUE")
        self.line = line


def directives_in(script: str) -> Iterator[Directive]:
    """Yield what sbatch reads in a script: up to the first line that is no comment. ValueError if it is unreadable."""
    for number, line in enumerate(script.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            return
        if line.startswith(("#PBS", "#BSUB")):  # sbatch reads these, too
            raise _Unreadable(line, number)
        if line.startswith("#SBATCH"):
            try:
                words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError:
                raise _Unreadable(line, number) from None
            for option, value in _options(words, line, number):
                yield Directive(option, value, number)


def _options(words: list[str], line: str, number: int) -> Iterator[tuple[str, str | bool]]:
    while words:
        word = words.pop(0)
        long = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=(.*))?", word, re.DOTALL)
        short = re.fullmatch(r"-([A-Za-z])(.*)", word, re.DOTALL)
        if long is None and (short is None or short[1] not in _LONG):
            raise _Unreadable(line, number)
        option, value = (long[1], long[2]) if long else (_LONG[short[1]], short[2] or None) if short else ("", None)
        if value is None and words and not words[0].startswith("-"):
            value = words.pop(0)
        yield option, True if value is None else value
