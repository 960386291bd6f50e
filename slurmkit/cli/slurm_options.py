"""Options of Slurm that have no flag here: what to write in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from slurmkit.errors import UserError
from slurmkit.job.spec import JobSpec

# https://slurm.schedmd.com/sbatch.html, of Slurm 22.05 to 26.05.
_WITH_VALUE = (
    "acctg-freq array batch bb bbf begin cluster-constraint clusters container container-id core-spec cores-per-socket "
    "cpu-freq cpus-per-gpu deadline delay-boot distribution extra extra-node-info gid gpu-bind gpu-freq "
    "gpus-per-socket gpus-per-task gres-flags hint kill-on-invalid-dep mcs-label mem-bind mem-per-cpu mem-per-gpu "
    "mincpus network nice nodefile ntasks-per-core ntasks-per-gpu ntasks-per-socket power prefer priority profile "
    "propagate resv-ports segment signal sockets-per-node switches thread-spec threads-per-core time-min tmp "
    "tres-bind tres-per-task uid umask wait-all-nodes wckey "
)
_WITHOUT_VALUE = (
    "contiguous get-user-env hold ignore-pbs no-kill overcommit oversubscribe quiet reboot requeue spread-job "
    "stepmgr use-min-nodes verbose"
)
_INSTEAD = {
    "ntasks": "one task runs on each node: give --nodes",
    "ntasks-per-node": "one task runs on each node: give --nodes",
    "job-name": "the run's name is the job's: give --name",
    "output": "a run's files lie in its run directory: give --results-dir and --name",
    "error": "a run's files lie in its run directory: give --results-dir and --name",
    "open-mode": "a run's files lie in its run directory: give --results-dir and --name",
    "input": "the command's standard input is empty",
    "chdir": "give --set workdir=FOLDER",
    "wrap": "write the command after --",
    "export": "the whole environment is carried: set more with --env NAME=VALUE",
    "export-file": "the whole environment is carried: set more with --env NAME=VALUE",
    "no-requeue": "give --set requeue=false",
    "test-only": "give --dry-run to submit",
    "parsable": "the first line that submit prints ends with the job id",
    "container-image": "give --image",
    "container-mounts": "give --mount",
    "container-mount-home": "give --set container.mount_home=true",
    "container-workdir": "give --set container.workdir=FOLDER",
    "container-name": "give --set container.name=NAME",
    "container-writable": "give --set container.writable=true",
}
_LETTERS = {
    **{"a": "array", "b": "begin", "B": "extra-node-info", "D": "chdir", "e": "error", "F": "nodefile", "H": "hold"},
    **{"i": "input", "J": "job-name", "k": "no-kill", "m": "distribution", "M": "clusters", "o": "output"},
    **{"O": "overcommit", "Q": "quiet", "s": "oversubscribe", "S": "core-spec", "W": "wait"},
}


def explain(error: click.NoSuchOption, has_queue: bool) -> click.UsageError:
    """Return what to write in place of an option of Slurm's; for any other option, the error itself."""
    name = error.option_name.lstrip("-")
    option = _LETTERS.get(name, name) if len(name) == 1 else name
    is_key = option.replace("-", "_") in JobSpec.model_fields
    if option in _INSTEAD:
        instead = _INSTEAD[option]
    elif option in (_WITH_VALUE + _WITHOUT_VALUE).split() or (is_key and not has_queue):
        key = option.replace("-", "_") if is_key else f"sbatch.{option}"
        instead = f"set it with --set {key}={'true' if option in _WITHOUT_VALUE.split() else 'VALUE'}"
    else:
        return error
    instead = instead if has_queue else "this command runs here, without Slurm"
    return click.UsageError(f"No such option '{error.option_name}': {instead}", error.ctx)


def refuse_misread_letters(words: Sequence[str]) -> None:
    """Refuse Slurm's meaning of a letter that means something else here. UserError says which."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        match = re.fullmatch(r"-([nc])(\d+)?", word)
        value = match and (match[2] or following)
        if match and value and value.isdigit():
            if match[1] == "n":
                said = f"-n is --name here: give --nodes {value} for nodes, or --name {value} for a run of that name"
            else:
                said = f"-c is --config here: give --cpus-per-task {value} for CPUs on each node"
            raise UserError(f"-{match[1]} {value}: {said}")
