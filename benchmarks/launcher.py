"""Milliseconds that slurmkit's commands take beside bare sbatch, submitit, torchx and NeMo-Run on one real cluster,
seconds for a sweep of 1,000 jobs, and requests to the controller per job for several node counts.

Every program is installed by pip into an environment of its own and takes its turn in every round, so that other load
meets all alike; NeMo-Run replaces torchx's schedulers, so they cannot share one. A submission is the shortest job that
the program can submit, to a partition that is down: no job starts. `files` is with a site's and a project's file.
A submission must put one job of one node into the queue, which is looked at after each. A program that puts anything
else there gets no ratio.

    sudo python benchmarks/launcher.py [--repeat 20] [--nodes 1 2 4 8] [--json FILE]

The jobs whose requests are counted run under the interpreter that runs this file, whose environment must hold ray.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _faults import REPOSITORY, cluster_of

from slurmkit.bench import equal_work

PACKAGES = {
    "slurmkit": [str(REPOSITORY)],
    "submitit": ["submitit==1.5.4"],
    "torchx": ["torchx==0.7.0"],
    # NeMo-Run asks for leptonai without an upper bound, and does not import with what that brings.
    "nemo-run": ["nemo-run==0.11.1", "leptonai==0.27.0"],
}
PARTITION = "high"  # devcluster has it beside the default one
SUBMITTERS = ("sbatch", "slurmkit submit", "slurmkit submit, files", "submitit", "torchx", "NeMo-Run")
SUBMITIT = f"""\
import submitit
executor = submitit.AutoExecutor(folder="submitit", cluster="slurm")
executor.update_parameters(slurm_partition="{PARTITION}", timeout_min=1)
print(executor.submit(print).job_id)
"""
NEMO_RUN = f"""\
import os
import nemo_run as run
tunnel = run.LocalTunnel(job_dir=os.path.abspath("nemo/experiments"))
executor = run.SlurmExecutor(
    account="root", partition="{PARTITION}", time="00:01:00", tunnel=tunnel, packager=run.Packager()
)
with run.Experiment("true", executor=executor, base_dir=os.path.abspath("nemo")) as experiment:
    experiment.add(run.Script(inline="true"))
    experiment.run(detach=True)
"""
SWEEP = """\
import sys
from pathlib import Path
from slurmkit.job.render import render
from slurmkit.job.settle import Request, settle
config = Path(sys.argv[1]) if len(sys.argv) > 1 else None
scripts = set()
for seed in range(1000):
    flags = {"name": f"sweep-{seed}", "env.SEED": str(seed)}
    what = {"config": config, "overrides": (f"grpo.seed={seed}",)} if config else {"command": ("train", f"seed={seed}")}
    settled = settle(Request(flags=flags, **what), Path.cwd())
    scripts.add(render(settled.spec, settled.templates))
assert len(scripts) == 1000
"""
SITE = """\
defaults: {nodes: 1, ray: {start_timeout: 300}}
limits:
  nodes: {max: 64}
  gpu_hours: {max: 5000}
partitions:
  batch:
    limits: {time: {max: 1-00:00:00}}
forbid: {env: [LD_PRELOAD]}
add:
  env: {NCCL_SOCKET_IFNAME: ib0}
"""
PROJECT = """\
partition: batch
time: 4:00:00
gres: gpu:h100:8
env: {OMP_NUM_THREADS: 8}
"""
# sdiag's own, and what nodes tell the controller of themselves, whoever submitted: up to 7 nodes report the end of any
# job step one by one, more of them together (REVERSE_TREE_WIDTH).
NOT_COUNTED = (
    "MESSAGE_EPILOG_COMPLETE",
    "MESSAGE_NODE_REGISTRATION_STATUS",
    "REQUEST_PING",
    "REQUEST_STATS_INFO",
    "REQUEST_STEP_COMPLETE",
)


def environments(cache: Path) -> dict[str, Path]:
    """The folder of each program's commands. What is there already is used again; slurmkit itself is installed anew."""
    found = {}
    for name, packages in PACKAGES.items():
        folder = cache / (name if name == "slurmkit" else packages[0])
        done = folder / "installed"
        if name == "slurmkit" or not done.exists():
            print(f"installing {' '.join(packages)} into {folder}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin/pip", "install", "-qq", *packages], check=True, stdout=sys.stderr)
            done.touch()
        found[name] = folder / "bin"
    return found


def commands(bins: dict[str, Path]) -> dict[str, Callable[[], list[str]]]:
    """What takes turns, by its name in the table; each is called for every round, as no two runs share a name."""
    slurmkit = f"{bins['slurmkit']}/slurmkit"
    torchx = f"{bins['torchx']}/torchx run --scheduler slurm -cfg partition={PARTITION},job_dir=torchx --workspace="
    # The others read no files of settings.
    with_files = "env -C project SLURMKIT_SITE=site.yaml"
    rows = {
        "python -c pass": f"{bins['slurmkit']}/python -c pass",
        "slurmkit --help": f"{slurmkit} --help",
        "slurmkit render": f"{slurmkit} render -- true",
        "slurmkit render, files": f"{with_files} {slurmkit} render -- true",
        "sbatch": f"sbatch --parsable --partition={PARTITION} job.sh",
        "slurmkit submit": f"{slurmkit} submit --partition={PARTITION} --name=NAME -- true",
        "slurmkit submit, files": f"{with_files} {slurmkit} submit --partition={PARTITION} --name=NAME -- true",
        "submitit": f"{bins['submitit']}/python use_submitit.py",
        "torchx": f"{torchx} utils.sh true",
        "NeMo-Run": f"{bins['nemo-run']}/python use_nemo_run.py",
    }
    return {name: partial(_words_of, line) for name, line in rows.items()}


def _words_of(line: str) -> list[str]:
    return shlex.split(line.replace("NAME", f"s{time.monotonic_ns()}"))


def in_turns(
    rows: dict[str, Callable[[], list[str]]], repeat: int, here: Path
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Return milliseconds of each run of each command, after a round that warms files up, and what submissions queued
    if that is not one job of one node."""
    taken: dict[str, list[float]] = {name: [] for name in rows}
    unequal: dict[str, list[str]] = {}
    for turn in range(repeat + 1):
        for name, command in rows.items():
            line = command()
            began = time.perf_counter()
            done = subprocess.run(line, cwd=here, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            ended = time.perf_counter()
            if done.returncode:
                sys.exit(f"{shlex.join(line)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
            queued = _output("squeue", "--noheader", "--array", f"--partition={PARTITION}", "--format=%D").split()
            if queued != (["1"] if name in SUBMITTERS else []):
                unequal.setdefault(name, []).append(f"queued {len(queued)} jobs of {', '.join(queued)} nodes")
            if queued:
                subprocess.run(["scancel", f"--partition={PARTITION}", "--state=PENDING"], check=True)
            if turn:
                taken[name].append((ended - began) * 1000)
    return taken, unequal


def sweep_seconds(python: Path, here: Path, repeat: int = 3) -> dict[str, float]:
    """Seconds of a whole process that renders 1,000 jobs, with a site's and a project's file."""
    taken: dict[str, list[float]] = {"a command": [], "a training configuration": []}
    for _ in range(repeat):
        for what, arguments in zip(taken, ([], [REPOSITORY / "examples/grpo_arithmetic.yaml"]), strict=True):
            began = time.perf_counter()
            environment = {**os.environ, "SLURMKIT_SITE": "site.yaml"}
            subprocess.run([python, "-c", SWEEP, *arguments], cwd=here / "project", env=environment, check=True)
            taken[what].append(time.perf_counter() - began)
    return {what: statistics.median(each) for what, each in taken.items()}


def requests(slurmkit: Path, nodes: int, here: Path) -> dict[str, int]:
    """Requests to the controller by their kind, from submission until a job on so many nodes has ended."""
    name = f"requests-{nodes}-{time.monotonic_ns()}"
    keys = [f"python={sys.executable}", "ray.num_cpus=1", "ray.object_store_memory=100000000"]
    options = [word for key in keys for word in ("--set", key)]
    subprocess.run(["sdiag", "--reset"], check=True, stdout=subprocess.DEVNULL)
    command = [str(slurmkit), "submit", f"--nodes={nodes}", "--partition=batch", f"--name={name}", *options]
    done = subprocess.run([*command, "--", "true"], cwd=here, check=True, capture_output=True, text=True)
    job_id = done.stdout.split()[1]
    deadline = time.monotonic() + 300
    # Accounting has a daemon of its own: asking it is no request to the controller.
    while (state := _output("sacct", "-X", "-n", "-o", "State", "-j", job_id).strip()) in ("", "PENDING", "RUNNING"):
        assert time.monotonic() < deadline, f"job {job_id} does not end"
        time.sleep(0.5)
    assert state == "COMPLETED", f"job {job_id} ended as {state}: see {here}/results/{name}"
    time.sleep(2)
    counted = _output("sdiag").partition("by message type")[2].partition("by user")[0]
    found = {kind: int(count) for kind, count in re.findall(r"(\w+)\s+\(\s*\d+\) count:(\d+)", counted)}
    return {kind: count for kind, count in sorted(found.items()) if kind not in NOT_COUNTED}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure(options: argparse.Namespace, here: Path) -> dict[str, object]:
    """Everything, printed as it is known."""
    bins = environments(options.cache)
    for name in ("torchx", "project"):
        (here / name).mkdir()
    for name, text in {
        "job.sh": "#!/bin/bash\ntrue\n",
        "use_submitit.py": SUBMITIT,
        "use_nemo_run.py": NEMO_RUN,
        "project/site.yaml": SITE,
        "project/slurmkit.yaml": PROJECT,
    }.items():
        (here / name).write_text(text)
    os.environ |= {"SLURMKIT_SITE": "", "NEMORUN_HOME": str(here / "nemo")}
    subprocess.run(["scontrol", "update", f"PartitionName={PARTITION}", "State=DOWN"], check=True)

    taken, unequal = in_turns(commands(bins), options.repeat, here)
    median = {name: statistics.median(each) for name, each in taken.items()}
    ratios = {
        name: equal_work.ratios(taken[name], taken["slurmkit submit"])
        for name in SUBMITTERS
        if name not in unequal and "slurmkit submit" not in unequal
    }
    print(f"\n{'milliseconds':<28}{'median':>9}{'least':>9}{'most':>9}{'÷ slurmkit submit':>24}")
    for name in sorted(median, key=median.__getitem__):
        ratio = equal_work.shown(ratios[name]) if name in ratios else "unequal" if name in SUBMITTERS else ""
        print(f"{name:<28}{median[name]:9.1f}{min(taken[name]):9.1f}{max(taken[name]):9.1f}{ratio:>24}")
    for name, problems in unequal.items():
        print(f"{name}: {problems[0]} ({len(problems)} times), not one job of one node: there is no ratio")
    for name in ("slurmkit submit", "slurmkit submit, files"):
        above = [mine - bare for mine, bare in zip(taken[name], taken["sbatch"], strict=True)]
        print(f"{name.removeprefix('slurmkit ') + ' above sbatch':<28}{statistics.median(above):9.1f}{min(above):9.1f}")

    seconds = sweep_seconds(bins["slurmkit"] / "python", here)
    print(
        "\n1,000 jobs rendered, each of " + ", ".join(f"{what}: {each:.2f} s" for what, each in seconds.items()),
        flush=True,
    )

    counts = {nodes: requests(bins["slurmkit"] / "slurmkit", nodes, here) for nodes in options.nodes}
    for nodes, kinds in counts.items():
        print(f"{sum(kinds.values()):3d} requests to the controller for a job of {nodes} nodes", flush=True)
    return {
        "milliseconds": taken,
        "median": median,
        "ratios": ratios,
        "unequal": unequal,
        "sweep_seconds": seconds,
        "requests": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20, help="rounds (default: 20)")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4, 8], help="node counts of counted jobs")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/slurmkit-bench").expanduser())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with (
        cluster_of(max([1, *options.nodes]), "bench") as cluster,
        tempfile.TemporaryDirectory(dir="/var/tmp") as here,
    ):
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        figures = {"load_average": load, **measure(options, Path(here))}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
