"""A command inside a running job: on one of its nodes, in its container, with the environment of its own command, but
without slurmkit's variables.

A job step that overlaps the bring-up's looks for a process of the job there and enters its namespaces. That is what
pyxis, `enroot exec` and `podman exec` do too, but needs no name of a container, and works alike for all runtimes.
"""

from __future__ import annotations

import os
import pwd
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from slurmkit.errors import Failure, UserError
from slurmkit.run.state import Queue, read_states
from slurmkit.slurm.client import SlurmClient
from slurmkit.slurm.command import hostnames, submission_environment

# Seconds to wait for the step to be made.
_PATIENCE = 60
# Runs on the node, outside of the container. The environment goes through a file descriptor: never through an argument,
# which everybody could read. The host's own programs do not get it, as an image's LD_PRELOAD may not suit them.
_OUTSIDE = r"""
attempt=$1 meet=$2 inside=$3
declare -a command="($4)"
driver_first() {  # of the job's processes, the oldest; the command and its children alone have Slurm's variables
  local file field is_ray
  while read -r file; do  # a job that was submitted from inside this one inherits the mark
    ! grep -qszx 'SLURM_JOB_ID=.*' "$file" || grep -qszx "SLURM_JOB_ID=${attempt%.*}" "$file" || continue
    field=$(<"${file%environ}stat") || continue
    read -ra field <<<"${field##*) }"
    is_ray=0; grep -qsz '^SLURM_JOB_ID=' "$file" || is_ray=1
    echo "$is_ray ${field[19]} ${file//[^0-9]/}"
  done < <(grep -lsz -x -- "SK_MARK=$attempt" /proc/[0-9]*/environ) 2>/dev/null | sort -n -k 1,1 -k 2,2
}
read -r _ _ pid < <(driver_first)
if [[ -z ${pid:-} ]]; then
  echo "error: nothing of the job runs on node $SLURMD_NODENAME yet: see its log, slurmkit logs --node" >&2
  exit 1
fi
address=''; [[ ! -r $meet/head ]] || address=$(<"$meet/head")
enter=()
for name in user mnt pid ipc uts net cgroup; do  # those that differ from ours: nobody may enter his own again
  [[ /proc/$pid/ns/$name -ef /proc/self/ns/$name ]] || enter+=("--${name/mnt/mount}")
done
if ((${#enter[@]})); then
  enter=(nsenter --target "$pid" "${enter[@]}" --preserve-credentials --wd)
else
  cd "$(readlink "/proc/$pid/cwd")" || cd /
fi
exec 4<"/proc/$pid/environ"
exec "${enter[@]}" bash -c "$inside" attach "$address" "${command[@]}"
"""
_INSIDE = r"""
address=$1 terminal=${TERM:-}; shift
for name in $(compgen -e); do unset "$name"; done
mapfile -d "" -t -u 4 variables
exec 4<&-
for variable in "${variables[@]}"; do export "${variable?}"; done 2>/dev/null
[[ -z $terminal ]] || export TERM=$terminal
[[ -n ${RAY_ADDRESS:-} || -z $address ]] || export RAY_ADDRESS=$address
unset variables variable name terminal address "${!SK_@}"  # or a job that is submitted here would inherit the mark
exec -- "$@"
"""


class Target(NamedTuple):
    """Where to. Example: Target("12", Path("results/t/attempts/12.0"), "node1")."""

    job_id: str
    attempt: Path
    node: str


def find_target(run: Path, node: str | None, client: SlurmClient) -> Target:
    """That node of the run's job, by default the first. UserError where it does not run, or is not this user's."""
    state = read_states([run], Queue(client))[0]
    if state.state not in ("starting", "running") or not state.attempts:
        raise UserError(f"{run.name} does not run: it is {state.state}{f' ({state.reason})' if state.reason else ''}")
    if state.job_id is None:
        raise UserError(
            f"{run.name} runs without Slurm{f' on {state.nodes}' if state.nodes else ''}: no job to attach to"
        )
    own = {job.job_id: job for job in client.jobs(user=pwd.getpwuid(os.getuid()).pw_name)}
    if state.job_id not in own:
        raise UserError(f"job {state.job_id} of {run.name} is another user's: only its owner can attach to it")
    job = own[state.job_id]
    if job.state != "RUNNING":
        raise UserError(f"{run.name} does not run: job {job.job_id} is {job.state}")
    names = hostnames(job.nodes)
    if node is not None and node not in names:
        raise UserError(f"--node {node}: no node of job {job.job_id}, which has {', '.join(names)}")
    return Target(job.job_id, state.attempts[-1].folder, node or names[0])


def attach(target: Target, command: Sequence[str], terminal: bool) -> NoReturn:
    """Become that command, whose exit code is this process's; `terminal` gives it one.

    Nothing of this process's environment but TERM gets there.
    """
    step = ["srun", "--overlap", f"--jobid={target.job_id}", f"--nodelist={target.node}", "--nodes=1", "--ntasks=1"]
    step += ["--mpi=none", f"--immediate={_PATIENCE}", "--export=TERM", "--chdir=/", "--quiet"]
    if terminal:
        step.append("--pty")
    # The command is one word: a word : of its own would begin another part of a heterogeneous job.
    meet = str(target.attempt / "bringup")
    words = ["/bin/bash", "-c", _OUTSIDE, "attach", target.attempt.name, meet, _INSIDE, shlex.join(command)]
    try:
        os.execvpe("srun", [*step, *words], submission_environment())
    except OSError as error:
        raise Failure(f"srun cannot be run: {error.strerror}") from None
