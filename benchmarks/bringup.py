"""Seconds from a job's start to its driver's start, and from the driver's end until every node has left, for several
node counts, beside the floor of a bare `ray start`.

The floor is what Ray itself takes on the same nodes in the same run: `ray start --head` on one node, then
`ray start --address` on all others at once, with no waiting, no checks and no clean-up in between. Afterwards both
sides count Ray's nodes that are alive. If a side has other nodes than those of the job, the row has no ratio.

    sudo python benchmarks/bringup.py [--nodes 1 2 4 8] [--repeat 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _faults import SLURMKIT, cluster_of

from slurmkit.bench import equal_work

BIN = Path(sys.executable).parent
RAY = "--disable-usage-stats --num-cpus=1 --object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0"

# Prints the number of Ray's nodes, of the Ray that RAY_ADDRESS names.
COUNT = "import ray; ray.init(logging_level='error'); print('nodes', sum(node['Alive'] for node in ray.nodes()))"
# Runs in one allocation; the head's port is any free one, told by Ray in its own folder.
FLOOR = f"""#!/bin/bash
set -euo pipefail
export PATH={shlex.quote(str(BIN))}:"$PATH" RAY_AUTH_MODE=disabled RAY_TMP=/tmp/floor-$SLURM_JOB_ID
began=$EPOCHREALTIME
srun -N1 -n1 -w "$SLURMD_NODENAME" bash -c 'ray start --head --port=0 --include-dashboard=false \
  --temp-dir=$RAY_TMP {RAY} && cp $RAY_TMP/ray_current_cluster address.$SLURM_JOB_ID \
  && touch head.$SLURM_JOB_ID || exit 1
  until [[ -e done.$SLURM_JOB_ID ]]; do sleep 0.05; done' &
head=$!
until [[ -e head.$SLURM_JOB_ID ]]; do kill -0 "$head"; sleep 0.05; done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
  srun -N$others -n$others -x "$SLURMD_NODENAME" bash -c 'ray start --address=$(<address.$SLURM_JOB_ID) \
    --temp-dir=$RAY_TMP {RAY} && touch up.$SLURM_JOB_ID.$SLURM_PROCID || exit 1
    until [[ -e done.$SLURM_JOB_ID ]]; do sleep 0.05; done' &
  workers=$!
  until (($(compgen -G "up.$SLURM_JOB_ID.*" | wc -l) == others)); do kill -0 "$workers"; sleep 0.05; done
fi
ended=$EPOCHREALTIME
RAY_ADDRESS=$(<address.$SLURM_JOB_ID) python -c {shlex.quote(COUNT)} >count.$SLURM_JOB_ID
touch done.$SLURM_JOB_ID
awk "BEGIN {{ print $ended - $began }}" >seconds.$SLURM_JOB_ID
scancel "$SLURM_JOB_ID"
"""


class Failed(Exception):
    """A job did not do what is measured."""


def slurmkit_seconds(nodes: int, here: Path) -> tuple[float, float, int]:
    """Return bring-up, from the batch script's first action on disk to the driver's; teardown, from the driver's end to
    the script's last action; and the number of Ray's nodes."""
    name = f"bench-{nodes}-{time.monotonic_ns()}"
    command = [str(SLURMKIT), "submit", "--wait", "-N", str(nodes), "--set", "ray.num_cpus=1", "--name", name]
    command += ["--set", "ray.object_store_memory=100000000"]
    driver = f"date +%s.%N; {shlex.join([sys.executable, '-c', COUNT])}; date +%s.%N"
    done = subprocess.run([*command, "--", "bash", "-c", driver], cwd=here, capture_output=True, text=True)
    attempts = here / "results" / name / "attempts"
    if done.returncode:
        logs = [path.read_text(errors="replace") for path in sorted((here / "results" / name).glob("slurm-*.out"))]
        raise Failed("\n".join([f"slurmkit submit ended with exit code {done.returncode}:", done.stderr, *logs]))
    said = (attempts / "latest/driver.log").read_text()
    times = [float(line) for line in re.findall(r"^\d+\.\d{9}$", said, re.MULTILINE)]
    up = times[0] - (attempts / "latest").lstat().st_mtime
    return up, (attempts / "latest/bringup").stat().st_mtime - times[-1], counted(said)


def floor_seconds(nodes: int, here: Path) -> tuple[float, int]:
    """Return the seconds that Ray alone takes, and the number of its nodes."""
    (here / "floor.sh").write_text(FLOOR)
    done = subprocess.run(
        ["sbatch", "--parsable", f"-N{nodes}", "floor.sh"], cwd=here, check=True, capture_output=True, text=True
    )
    job_id = done.stdout.strip()
    deadline = time.monotonic() + 300
    while subprocess.run(["squeue", "-h", "-j", job_id], capture_output=True, text=True).stdout.strip():
        if time.monotonic() > deadline:
            raise Failed(f"job {job_id} of bare Ray has not ended after 300 s")
        time.sleep(0.5)
    result, log = here / f"seconds.{job_id}", here / f"slurm-{job_id}.out"
    if not result.exists():
        said = log.read_text(errors="replace") if log.exists() else f"there is no {log}"
        raise Failed(f"job {job_id} of bare Ray on {nodes} nodes failed:\n{said}")
    return float(result.read_text()), counted((here / f"count.{job_id}").read_text())


def counted(text: str) -> int:
    """Return the number that COUNT printed."""
    found = re.search(r"^nodes (\d+)$", text, re.MULTILINE)
    if not found:
        raise Failed(f"Ray's nodes could not be counted:\n{text}")
    return int(found[1])


def row_of(nodes: int, ours: list[tuple[float, float, int]], floors: list[tuple[float, int]]) -> dict[str, object]:
    """Return the spreads of all turns of a node count; without a ratio if a side had other nodes than the job's."""
    ups, downs, up_nodes = zip(*ours, strict=True)
    bare, bare_nodes = zip(*floors, strict=True)
    row: dict[str, object] = {"nodes": nodes, "bringup_s": equal_work.spread(ups)}
    row |= {"bare_ray_s": equal_work.spread(bare), "teardown_s": equal_work.spread(downs)}
    others = [
        f"{side} had {found}" for side, each in (("slurmkit", up_nodes), ("bare Ray", bare_nodes)) for found in each
    ]
    if set(up_nodes) | set(bare_nodes) != {nodes}:
        return row | {"unequal": f"nodes of Ray in a job of {nodes}: {', '.join(others)}"}
    return row | {"ratio": equal_work.ratios(ups, bare)}


def line_of(row: dict[str, object]) -> str:
    """Return a row as text: medians with the least and the most."""
    keys = ("bringup_s", "bare_ray_s", "ratio", "teardown_s")
    return f"{row['nodes']:>5}" + "".join(
        f"{equal_work.shown(row[key]) if key in row else 'unequal':>24}"  # type: ignore[arg-type]
        for key in keys
    )


def measure(counts: list[int], repeat: int, here: Path) -> list[dict[str, object]]:
    """Run both sides in turns, so that other load affects both."""
    rows = []
    for nodes in counts:
        ours, floors = [], []
        for turn in range(repeat):
            if turn % 2:
                ours.append(slurmkit_seconds(nodes, here))
            floors.append(floor_seconds(nodes, here))
            if not turn % 2:
                ours.append(slurmkit_seconds(nodes, here))
        rows.append(row_of(nodes, ours, floors))
        print(line_of(rows[-1]), flush=True)
        if "unequal" in rows[-1]:
            print(f"      {rows[-1]['unequal']}: the work is unequal, so there is no ratio.", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = os.getloadavg()[0]
    try:
        with cluster_of(max(options.nodes), "bench") as cluster, tempfile.TemporaryDirectory(dir="/var/tmp") as here:
            os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
            print(f"median (least–most) of {options.repeat}; load average {began:.2f} when this began")
            print("nodes" + "".join(f"{name:>24}" for name in ("bring-up s", "bare Ray s", "ratio", "teardown s")))
            rows = measure(options.nodes, options.repeat, Path(here))
    except Failed as error:
        sys.exit(f"error: {error}")
    if options.out:
        options.out.write_text(json.dumps({"load_average": began, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
