"""A rendered job in rehearsal: the script itself runs, on this machine alone, where stand-ins play srun and Ray.

So what a template does is seen and not guessed from its text: how the job ends, what it leaves, what it lets out.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from slurmkit.job.keeper_file import keeper_text, name_of_keeper
from slurmkit.job.spec import JobSpec
from slurmkit.job.trace import Traced

# Seconds; each rehearsal takes one or two.
_DEADLINE = 20
_CANARY = "canary-of-slurmkit-templates-check"
HOSTILE = ("a  b", "it's", '"', "$HOME", "$(touch pwned)", "`touch pwned`", "; touch pwned", "*", "", "\\", "x\ny")
# They end by themselves after a minute: the process that would end them may be killed.
_STAND_INS = {
    "srun": """#!/bin/bash
while (($#)) && [[ $1 != bash || ${2:-} != -*c ]]; do shift; done  # options, and a container
(($#)) || exit 0
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_NNODES=1 SLURMD_NODENAME=node1 SLURM_CPUS_ON_NODE=1
export SLURM_LAUNCH_NODE_IPADDR=127.0.0.1
exec "$@"
""",
    "ray": """#!/bin/bash
[[ $1 == start ]] || exit 0
for word in "$@"; do
  [[ $word != --temp-dir=* ]] || { mkdir -p "${word#*=}"; echo 127.0.0.1:1 >"${word#*=}/ray_current_cluster"; }
done
"${0%/*}/raylet" -c 'sleep "$1"; :' raylet "$CHECK_RAYLET" </dev/null >/dev/null 2>&1 &
until [[ $(<"/proc/$!/comm") == raylet ]]; do sleep 0.01; done
""",
    "driver": """#!/bin/bash
printf '%s\\0' "$@" "$V" >"$CHECK/words"
trap 'exit 0' USR2
touch "$CHECK/started"
case $CHECK_COMMAND in stay) for _ in {1..1200}; do sleep 0.05; done ;; *) exit "$CHECK_COMMAND" ;; esac
""",
    "squeue": """#!/bin/bash
echo "$CHECK_SLURM"
""",
}
# Read by the batch shell alone, before the script: says after which line the safety of a shell's options was gone.
_LOOK = """unset BASH_ENV
look() {  # LINE
  case $BASH_COMMAND:$SHELLOPTS in
    "set -e"*) ;;
    *:*errexit*nounset*pipefail*xtrace*) echo "${CHECK_LINE:-$1}" >>"$CHECK/traced" ;;
    *:*errexit*nounset*pipefail*) CHECK_LINE=$1 ;;
    *) echo "${CHECK_LINE:-$1}" >>"$CHECK/unsafe" ;;
  esac
}
trap 'look $LINENO' DEBUG
"""
_NOTHING = ("scontrol", "sinfo", "sacct", "scancel", "sbcast", "sstat")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rehearsal found wrong: what happened in which act, to which script."""

    act: str
    what: str
    traced: Traced
    line: int | None = None
    """Line of the script, where one can be named."""
    blocks: tuple[str, ...] = ()
    """Else: the blocks that could be the reason."""


@dataclass(frozen=True, slots=True)
class _Act:
    title: str
    code: int
    command: str = "0"
    raylet: str = "60"
    send: int | None = None
    slurm: str = "COMPLETING None N/A"  # what squeue says of a signal: state, reason, time of preemption
    keys: tuple[tuple[str, Any], ...] = ()
    has_keeper: bool = True


ACTS = (
    _Act("the command succeeds", 0),
    _Act("the command fails with exit code 7", 7, command="7"),
    _Act("the command fails with exit code 7, without the keeper", 7, command="7", has_keeper=False),
    _Act("a node's Ray dies", 75, command="stay", raylet="1"),
    _Act("a line of setup fails on a node", 75, keys=(("setup", ["false", "true"]),)),
    _Act("Slurm cancels the job", 143, command="stay", send=signal.SIGTERM),
    _Act("Slurm cancels the job without the keeper", 143, command="stay", send=signal.SIGTERM, has_keeper=False),
    _Act("the time limit is reached", 0, command="stay", send=signal.SIGTERM, slurm="COMPLETING TimeLimit N/A"),
    _Act("Slurm sends USR2 for the command", 0, command="stay", send=signal.SIGUSR2),
)
_ENDING = ("launch", "epilogue", "bring_up", "modules")


def rehearse(rendered: Callable[[JobSpec], Traced]) -> Iterator[Finding]:
    """Run a job's script in each way in which a job can go."""
    with TemporaryDirectory(prefix="slurmkit-check-") as folder, ThreadPoolExecutor(3) as pool:
        Path(folder, "look").write_text(_LOOK)
        acts = [(act, Path(folder, f"{number} it's $(touch pwned)")) for number, act in enumerate(ACTS)]
        for findings in pool.map(lambda item: [*_run(item[0], item[1], rendered)], acts):
            yield from findings


def _run(act: _Act, folder: Path, rendered: Callable[[JobSpec], Traced]) -> Iterator[Finding]:
    bin_ = folder / "bin"
    bin_.mkdir(parents=True)
    for name, text in {**_STAND_INS, **dict.fromkeys(_NOTHING, "#!/bin/sh\n")}.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    (bin_ / "raylet").symlink_to("/bin/bash")
    (bin_ / "python3").symlink_to(os.path.realpath(sys.executable))
    run_dir = folder / "run"
    (run_dir / "attempts").mkdir(parents=True)
    spec = _spec(folder, run_dir, dict(act.keys))
    if act.has_keeper:
        (run_dir / name_of_keeper()).write_text(keeper_text())
    script = run_dir / "job.sbatch"
    traced = rendered(spec)
    script.write_text(traced.script)
    job_id = f"{os.getpid()}{folder.name[0]}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SK_", "RAY_"))}
    environment |= {
        **{"PATH": f"{bin_}:{os.environ.get('PATH', '/usr/bin:/bin')}", "BASH_ENV": str(folder.parent / "look")},
        **{"SLURM_JOB_ID": job_id, "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"},
        **{"CHECK": str(folder), "CHECK_COMMAND": act.command, "CHECK_RAYLET": act.raylet},
        **{"CHECK_SLURM": act.slurm},
        **{"HF_TOKEN": _CANARY, "CHECK_SECRET": _CANARY},
    }
    # As for a batch job, the output is opened before the script sets its umask.
    with (run_dir / "slurm.out").open("w") as output:
        process = subprocess.Popen(
            ["bash", script], env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, umask=0o022, start_new_session=True,
        )  # fmt: skip
        code = _attend(process, act, folder)
    left = _end(process, f"{job_id}.0")
    rmtree(f"/tmp/sk-{job_id}.0", ignore_errors=True)  # the bring-up's, which a killed one leaves
    for blocks, what in _faults(act, code, left, folder, spec):
        yield Finding(act.title, what, traced, blocks=blocks)
    for name, what in (("unsafe", "set -euo pipefail does not hold"), ("traced", "the shell prints every value")):
        if (folder / name).exists():
            line = int((folder / name).read_text().split()[0])
            text = traced.script.splitlines()[line - 1].strip()
            yield Finding(act.title, f"{what} from {text!r} on", traced, line)


def _spec(folder: Path, run_dir: Path, keys: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate(
        {
            **{"name": "check", "python": str(folder / "bin/python3"), "workdir": str(folder), "run_dir": str(run_dir)},
            **{"command": [str(folder / "bin/driver"), *HOSTILE], "env": {"V": "".join(HOSTILE)}, "config": "a: 1\n"},
            **{"setup": ["true"], "epilogue": ["false", "exit 3"]},
            "secrets": {"HF_TOKEN": {"env": "HF_TOKEN"}},
            **{"ray": {"num_cpus": 1, "object_store_memory": 80_000_000, "start_timeout": 20}, **keys},
        }
    )


def _attend(process: subprocess.Popen[bytes], act: _Act, folder: Path) -> int | None:
    """Wait for the script's end, after the signal that belongs to the act. None: it did not end in time."""
    deadline = time.monotonic() + _DEADLINE
    while act.send is not None and process.poll() is None and time.monotonic() < deadline:
        if (folder / "started").exists():
            process.send_signal(act.send)
            break
        time.sleep(0.05)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes], attempt: str) -> list[str]:
    """End whatever is left of a job, and name it: by the mark that the bring-up gives, and by its session."""
    deadline = time.monotonic() + 2
    while process.returncode is not None and time.monotonic() < deadline and [*_left(process.pid, attempt)]:
        time.sleep(0.05)  # the pause of a loop that has ended
    names = []
    for folder in _left(process.pid, attempt):
        with suppress(OSError):
            names.append((folder / "comm").read_text().strip())
            os.kill(int(folder.name), signal.SIGKILL)
    process.wait()
    return names


def _left(session: int, attempt: str) -> Iterator[Path]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            marked = f"SK_MARK={attempt}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if fields[0] != "Z" and (marked or int(fields[3]) == session):
                yield folder


def _faults(
    act: _Act, code: int | None, left: list[str], folder: Path, spec: JobSpec
) -> Iterator[tuple[tuple[str, ...], str]]:
    run_dir = folder / "run"
    output = (run_dir / "slurm.out").read_text(errors="replace")
    if code is None:
        yield _ENDING, f"has not ended after {_DEADLINE} s; its output ends:\n{_tail(output)}"
    elif code != act.code:
        logs = sorted((run_dir / "attempts").glob("*/node-*.log"))
        said = _tail("".join([output, *(path.read_text(errors="replace") for path in logs[:1])]))
        how = f"ends with exit code {code}" if code >= 0 else f"is killed by {signal.Signals(-code).name}"
        yield _ENDING, f"{how} and not {act.code}; its output ends:\n{said}"
    elif left:
        yield ("bring_up", "launch"), f"leaves processes behind: {', '.join(sorted(set(left)))}"
    words = folder / "words"
    if words.exists():
        expected = "".join(f"{word}\0" for word in (*HOSTILE, spec.env["V"])).encode()
        if words.read_bytes() != expected:
            yield ("command", "environment", "launch"), "the command's words or its environment arrive changed"
    if next(folder.rglob("pwned"), None):
        yield (), "a value ran as code"
    if not (run_dir / "config.yaml").exists():
        yield ("preflight", "command"), "the training configuration is not in the run directory"
    files = [path for path in sorted(run_dir.rglob("*")) if path.is_file() and not path.is_symlink()]
    for name in sorted({path.name for path in files if _CANARY in path.read_text(errors="replace")}):
        yield (), f"the environment, secrets included, is written to {name}"
    # The output is slurmd's to open, and the rest slurmkit's.
    laid_out = ("job.sbatch", name_of_keeper())
    modes = [path.stat().st_mode for path in files if path.name not in ("slurm.out", *laid_out)]
    if any(stat.S_IMODE(mode) & 0o007 for mode in modes):
        yield ("command", "preflight"), "what the job writes can be read by everybody: umask"


def _tail(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-8:])
