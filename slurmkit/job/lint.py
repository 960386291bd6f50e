"""`slurmkit templates check`: whether the templates in force still make jobs that are safe and end as they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurmkit.errors import UserError
from slurmkit.job.rehearsal import HOSTILE, rehearse
from slurmkit.job.render import PACKAGED, environment_for, runtimes
from slurmkit.job.spec import JobSpec
from slurmkit.job.trace import Traced, render_traced

_GRES: dict[str, dict[str, Any]] = {
    "gpu:8": {"gres": "gpu:8"},
    "gpu:h100:8": {"gres": "gpu:h100:8"},
    "two types": {"gres": "gpu:h100:4,gpu:a100:4"},
    "shards": {"gres": "shard:4"},
    "gpus-per-node": {"gpus_per_node": "h100:8", "cpus_per_gpu": 4},
    "gpus": {"gpus": "16", "nodes": 2},
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong, for the first of the specs or the rehearsal in which it showed.

    Example: Problem("/site/job.sbatch.j2", "epilogue", "ends with exit code 0 and not 7", "the command fails").
    """

    file: str
    block: str
    what: str
    spec: str

    def __str__(self) -> str:
        block = f", block {self.block}" if self.block else ""
        return f"{self.file}{block}: {self.what} (spec: {self.spec})"


def specs(known: list[str]) -> dict[str, JobSpec]:
    """The table of jobs that every template must serve; `known` are the container runtimes that there are."""
    words = list(HOSTILE)
    table: dict[str, dict[str, Any]] = {
        "one node": {},
        "eight nodes": {"nodes": 8, "time": "1-00:00:00", "exclusive": True, "cpus_per_task": 16, "mem": "0"},
        "config": {"config": "grpo: {seed: 1}\n"},
        "hostile values": {
            **{"command": ["bash", "-c", *words], "env": {"V": "".join(words)}, "run_dir": "/r/it's $(id) * 100%"},
            **{"workdir": '/w/"a b"', "comment": 'a "b" \\ # $(id)', "python": "/p/it's here/python3"},
        },
        "array": {"array": "0-7%2"},
        "setup and epilogue": {"prologue": ["ulimit -l unlimited"], "setup": ["true"], "epilogue": ["date", "false"]},
        "ray": {"ray": {"num_cpus": 4, "object_store_memory": 10**9, "start_timeout": 60}},
        "signal and requeue": {"signal": "B:USR2@300", "requeue": False, "sbatch": {"licenses": "a:1", "hold": True}},
        "until done": {
            **{"until_done": {"enabled": True, "max_hours": 48.5}, "watchdog": 60, "time": "4:00:00", "nodes": 2},
            "config": "grpo: {seed: 1}\n",
        },
        "srun": {"srun": ["--cpu-bind=none"]},
        "secrets": {"secrets": {name: {"env": name} for name in ("HF_TOKEN", "WANDB_API_KEY")}},
        **{f"GRES: {form}": keys for form, keys in _GRES.items()},
    }
    for runtime in known:
        image: dict[str, Any] = {"image": "/images/a b.sqsh"} if runtime != "none" else {}
        table[f"runtime {runtime}"] = {"nodes": 2, "container": {"runtime": runtime, **image}}
    minimal = {"name": "check", "python": "python3", "workdir": "/w", "run_dir": "/r", "command": ["true"]}
    return {name: JobSpec.model_validate({**minimal, **keys}) for name, keys in table.items()}


def check(folders: tuple[Path, ...]) -> list[Problem]:
    """All that is wrong with the templates in force, each once, with the first spec in which it shows."""
    found: dict[tuple[str, str, str], Problem] = {}
    for problem in _problems(folders):
        found.setdefault((problem.file, problem.block, problem.what), problem)
    return list(found.values())


def _problems(folders: tuple[Path, ...]) -> Iterator[Problem]:
    table = specs(runtimes(environment_for(folders)))
    scripts: dict[str, Traced] = {}
    for name, spec in table.items():
        try:
            scripts[name] = render_traced(spec, folders)
        except UserError as error:
            place, _, what = str(error).partition(": ")
            yield Problem(place, "", what, name)
    for name, traced in scripts.items():
        for line, what in _of_directives(table[name], traced.script):
            yield Problem(*_blame(traced, line, ("directives",)), what, name)
    # Many specs differ in their directives alone, which neither bash nor shellcheck reads.
    bodies = {re.sub(r"^#.*", "#", scripts[name].script, flags=re.MULTILINE): name for name in reversed(scripts)}
    is_shell = len(scripts) == len(table)
    with ThreadPoolExecutor(2) as pool:
        for name, (ok, said) in zip(bodies.values(), pool.map(_by_shell, bodies), strict=True):
            is_shell = is_shell and ok
            for line, what in said:
                yield Problem(*_blame(scripts[name], line), what, name)
    for finding in rehearse(lambda spec: render_traced(spec, folders)) if is_shell else ():
        yield Problem(*_blame(finding.traced, finding.line, finding.blocks), finding.what, finding.act)


def _blame(traced: Traced, line: int | None, blocks: tuple[str, ...] = ()) -> tuple[str, str]:
    """The file and block that a line is from, or the overrides that could be the reason: not a packaged file's own."""
    ours = str(PACKAGED)
    place = (f"{ours}/job.sbatch.j2", "") if line is None else traced.place(line)
    changed = [part for part in dict.fromkeys(traced.parts) if not part[0].startswith(ours)]
    if not place[0].startswith(ours) or not changed:
        return place
    suspects = [part for part in changed if part[1] in (place[1], *blocks)] or changed
    file = suspects[0][0]
    return file, " or ".join(block for name, block in suspects if name == file)


def _of_directives(spec: JobSpec, script: str) -> Iterator[tuple[int, str]]:
    lines = script.splitlines()
    if not lines[0].startswith("#!"):
        yield 1, "the first line does not say which shell runs the script: #!/bin/bash"
    first = next((number for number, line in enumerate(lines, 1) if line and not line.startswith("#")), len(lines))
    for number, line in enumerate(lines, 1):
        if line.startswith("#SBATCH") and number > first:
            yield number, f"sbatch ignores {line!r}, which comes after the first command"
    present = {re.split("[= ]", line.removeprefix("#SBATCH --"))[0] for line in lines[:first] if "#SBATCH --" in line}
    for option, _ in spec.directives():
        if option not in present:
            yield 1, f"the directives lose --{option}, which the job asks for"


def _by_shell(script: str) -> tuple[bool, list[tuple[int, str]]]:
    """Whether bash can read it, and what bash and shellcheck say of which line."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if done.returncode != 0:
        found = re.match(r"bash: line (\d+): (.*)", done.stderr)
        return False, [(int(found[1]), f"bash -n: {found[2]}") if found else (1, f"bash -n: {done.stderr.strip()}")]
    program = shellcheck()
    if program is None:
        return True, []
    # SC2089 and SC2090 are about quotes inside of values, which are meant; the rehearsals see that they arrive.
    command = [program, "--severity=warning", "--shell=bash", "--exclude=SC2089,SC2090", "--format=json", "-"]
    answer = subprocess.run(command, input=script, capture_output=True, text=True)
    findings = json.loads(answer.stdout)
    return True, [(found["line"], f"shellcheck: SC{found['code']}: {found['message']}") for found in findings]


def shellcheck() -> str | None:
    """On PATH, or beside the interpreter; None where there is none."""
    return shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
