"""What only the machine that submits is asked: slurmkit itself, and Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from functools import cache
from importlib import metadata

from slurmkit import __version__
from slurmkit.doctor.finding import Checks, Finding, Subject, ask, last_line

check = CHECKS = Checks()
_MANY = 6


@check("slurmkit")
def slurmkit(_: Subject) -> Finding:
    """slurmkit's own packages are those that it was made for."""
    from packaging.requirements import Requirement

    try:
        texts = metadata.requires("slurmkit") or []
    except metadata.PackageNotFoundError:
        return Finding("warn", f"{__version__} runs without being installed", "pip install it: jobs need it, too")
    wrong = []
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = "missing"
            if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name} {version}, not {requirement.specifier}")
    found = f"{__version__} on Python {sys.version.split()[0]} ({sys.executable})"
    if wrong:
        return Finding("fail", f"{found}: {'; '.join(wrong)}", "pip install --upgrade slurmkit")
    return Finding("ok", found)


@check("Slurm commands")
def commands(_: Subject) -> Finding:
    """Slurm's commands are on PATH."""
    needed = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
    missing = [program for program in needed if shutil.which(program) is None]
    if len(missing) == len(needed):
        return Finding("warn", "no Slurm here", "slurmkit run trains here; to submit, use a login node of a cluster")
    if missing:
        return Finding("fail", f"{', '.join(missing)} not on PATH", "load your site's Slurm module, or extend PATH")
    return Finding(
        "ok", f"{ask('sbatch', '--version', seconds=5).stdout.strip() or 'version unknown'} ({shutil.which('sbatch')})"
    )


@cache
def _sinfo() -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.monotonic()
    done = ask("sinfo", "--noheader", "--format=%P|%a|%D|%T")
    return done, time.monotonic() - start


@check("controller")
def controller(_: Subject) -> Finding | None:
    """The controller answers, which takes credentials that it accepts."""
    if shutil.which("sinfo") is None:
        return None
    done, seconds = _sinfo()
    if done.returncode == 0:
        return Finding("ok", f"answers in {seconds:.2f} s and accepts our credentials")
    said = (done.stderr + done.stdout).lower()
    if any(word in said for word in ("munge", "authentication", "credential")):
        return Finding("fail", last_line(done), "see that munged runs (munge -n | unmunge) and that the clocks agree")
    place = os.environ.get("SLURM_CONF", "not set")
    return Finding("fail", last_line(done), f"scontrol ping; is this the right slurm.conf? (SLURM_CONF: {place})")


@check("partitions")
def partitions(subject: Subject) -> Finding | None:
    """The partition that jobs go to is up and has nodes."""
    if shutil.which("sinfo") is None or _sinfo()[0].returncode != 0:
        return None
    nodes: dict[str, list[int]] = {}  # name -> [usable nodes, idle nodes]
    for line in _sinfo()[0].stdout.splitlines():
        name, available, count, state = line.strip().split("|")
        counts = nodes.setdefault(name, [0, 0])
        if available == "up" and state.rstrip("*~#!%$@^-+") in ("idle", "mixed", "allocated", "completing"):
            counts[0] += 0 if state.endswith("*") else int(count)
            counts[1] += int(count) if state == "idle" else 0
    told = [f"{name} {usable} nodes up, {idle} idle" for name, (usable, idle) in nodes.items()]
    found = "; ".join([*told[:_MANY], f"and {len(told) - _MANY} more"] if len(told) > _MANY else told) or "none"
    if subject.partition is None:
        wanted = next((name for name in nodes if name.endswith("*")), None)
        if wanted is None:
            return Finding("warn", f"{found}; none is the default", "name one: --partition, or in slurmkit.yaml")
    else:
        wanted = next((name for name in nodes if name.rstrip("*") == subject.partition), subject.partition)
    if wanted not in nodes:
        return Finding("fail", f"no partition {wanted}; there are {found}", "name one of these with --partition")
    if nodes[wanted][0] == 0:
        return Finding("fail", f"no node of {wanted} is up; {found}", "sinfo -R tells why; or name another --partition")
    return Finding("ok", found)


@check("accounting")
def accounting(_: Subject) -> Finding | None:
    """The accounting remembers jobs that the controller has forgotten."""
    if shutil.which("sinfo") is None or _sinfo()[0].returncode != 0:
        return None
    done = ask("sacct", "-X", "-n", "-S", "now-1minutes")
    if done.returncode == 0:
        return Finding("ok", "sacct answers")
    return Finding("warn", last_line(done), "nothing to do; how a job ended is known only while the controller has it")
