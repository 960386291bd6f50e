"""A rendered file on its way into the queue, as it is: the job it holds, and what git says of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from slurmkit.config.source import Source
from slurmkit.errors import UserError
from slurmkit.job.audit import RenderedFile, read_rendered, sidecar_of
from slurmkit.job.layers import EXTRA_KEYS, site_file
from slurmkit.job.provenance import SYMBOLIC_LINK, repository_of
from slurmkit.job.settle import Request, Settled
from slurmkit.job.site import Site, read_site
from slurmkit.job.site_templates import template_refusals


def read_committed(
    request: Request, require: bool, environ: Mapping[str, str] = os.environ
) -> tuple[Settled, str, dict[str, Any]]:
    """The job of the rendered file in `request`, its text, and what its attempt records.

    Refused with a UserError: anything in `request` that would change the job, a file that is not what was rendered,
    and a job that the site's rules of today forbid. With `require`, or where the site asks for it, also files whose
    bytes are not the last commit's.
    """
    assert request.run_file is not None
    rendered = read_rendered(request.run_file)
    path = rendered.path
    asked = [*request.flags, *request.overrides]
    asked += [name for name in ("config", "command", "profile", "resume") if getattr(request, name)]
    if asked:
        raise UserError(
            f"{path} is submitted as it is, so {asked[0]} cannot be given with it; change it where the job is "
            f"described and render it again: {rendered.again}"
        )
    edits = list(rendered.edits())
    if edits:
        raise UserError("\n".join([*edits, f"render it again: {rendered.again}"]))
    settled = rendered.settled()
    rules = site_file(environ)
    if rules is not None:
        site = read_site(rules)
        problems = list(dict.fromkeys(_broken_rules(site, settled)))
        if problems:
            raise UserError("\n".join(problems))
        require = require or site.rules.require_committed
        settled = settled._replace(site=rules.absolute())
    return settled, rendered.data.decode(), _what_git_says(rendered, require)


def _broken_rules(site: Site, settled: Settled) -> Iterator[str]:
    """The site's rules may be others than when the file was rendered, or none were known there."""
    data = settled.spec.model_dump(mode="json")
    locked = {key for _, rules, _ in site.rule_sets(settled.spec.partition) for key in rules.lock}
    defaults = site.defaults(settled.spec.partition).data
    # What these said is in the spec's other keys by now.
    data |= {key: defaults.get(key) if key in locked else "settled" for key in EXTRA_KEYS}
    source = Source(data, {tuple(key.split(".")): origin for key, origin in settled.origins.items()})
    others = [folder for folder in settled.templates if folder != site.templates]
    if "templates" in locked and others and str(others[0]) != str(defaults.get("templates")):
        data["templates"] = str(others[0])
        source.origins["templates",] = "the rendered file's record"
    yield from site.locks_and_requirements(source)
    yield from site.refusals(settled.spec, source)
    yield from template_refusals(site, settled.spec, source, settled.templates)


def _what_git_says(rendered: RenderedFile, require: bool) -> dict[str, Any]:
    path = rendered.path.parent.resolve() / rendered.path.name
    repository = repository_of(path.parent)
    found = {"file": str(path), "sha256": rendered.sidecar.sha256}
    if repository is None:
        if require:
            raise UserError(f"{rendered.path} is in no git repository, and only a committed file may be submitted")
        return found
    changed = repository.not_committed(path, sidecar_of(path))
    links = [file for file, word in changed.items() if word == SYMBOLIC_LINK]
    if links and require:
        raise UserError(
            f"only a committed file may be submitted; {os.path.relpath(links[0])} is a symbolic link to "
            f"{os.readlink(links[0])}, and git stores only the link: commit the sbatch file and its record where they "
            f"are, and submit that file: slurmkit submit {shlex.quote(os.path.relpath(path.resolve()))}"
        )
    if changed and require:
        listed = " and ".join(f"{os.path.relpath(file)} ({word})" for file, word in changed.items())
        raise UserError(f"only a committed file may be submitted; git says {listed}: commit first")
    tree = {
        str(file.relative_to(repository.root)): word
        for file, word in sorted(repository.changes().items())
        if file not in changed
    }
    git = {"commit": repository.commit, "changed": {file.name: word for file, word in changed.items()}, "tree": tree}
    return {**found, "git": git}


def few(changed: Mapping[str, str]) -> str:
    """Return the first three files of `git status`, each with its word, and the number of the others."""
    listed = [f"{name} ({word})" for name, word in changed.items()]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
