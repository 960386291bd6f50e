"""Seconds from a job's start to its driver's start, and from the driver's end until every node has left, for several
node counts, beside the floor of a bare `ray start`.

The floor is what Ray itself takes on the same nodes in the same run: `ray start --head` on one node, then
`ray start --address` on all others at once, with no waiting, no checks and no clean-up in between.

    sudo python benchmarks/bringup.py [--nodes 1 2 4 8] [--repeat 3] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEVCLUSTER = REPOSITORY / "scripts" / "devcluster"
BIN = Path(sys.executable).parent
RAY = "--disable-usage-stats --num-cpus=1 --object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0"

# Runs in one allocation; the head's port is any free one, told by Ray in its own folder.
FLOOR = f"""#!/bin/bash
set -euo pipefail
export PATH={BIN}:$PATH RAY_AUTH_MODE=disabled RAY_TMP=/tmp/floor-$SLURM_JOB_ID
began=$EPOCHREALTIME
srun -N1 -n1 -w "$SLURMD_NODENAME" bash -c 'ray start --head --port=0 --include-dashboard=false \
  --temp-dir=$RAY_TMP {RAY} && cp $RAY_TMP/ray_current_cluster address.$SLURM_JOB_ID && touch head.$SLURM_JOB_ID
  until [[ -e done.$SLURM_JOB_ID ]]; do sleep 0.05; done' &
until [[ -e head.$SLURM_JOB_ID ]]; do sleep 0.05; done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
  srun -N$others -n$others -x "$SLURMD_NODENAME" bash -c 'ray start --address=$(<address.$SLURM_JOB_ID) \
    --temp-dir=$RAY_TMP {RAY} && touch up.$SLURM_JOB_ID.$SLURM_PROCID
    until [[ -e done.$SLURM_JOB_ID ]]; do sleep 0.05; done' &
  until (($(compgen -G "up.$SLURM_JOB_ID.*" | wc -l) == others)); do sleep 0.05; done
fi
ended=$EPOCHREALTIME
touch done.$SLURM_JOB_ID
awk "BEGIN {{ print $ended - $began }}" >seconds.$SLURM_JOB_ID
scancel "$SLURM_JOB_ID"
"""


def slurmkit_seconds(nodes: int, here: Path) -> tuple[float, float]:
    """Bring-up: from the batch script's first action on disk to the driver's. Teardown: to the script's last one."""
    name = f"bench-{nodes}-{time.monotonic_ns()}"
    command = [BIN / "slurmkit", "submit", "--wait", "-N", str(nodes), "--set", "ray.num_cpus=1", "--name", name]
    keys = ["--set", "ray.object_store_memory=100000000", "--", "date", "+%s.%N"]
    subprocess.run([*command, *keys], cwd=here, check=True, stdout=subprocess.DEVNULL)
    attempts = here / "results" / name / "attempts"
    driver = float((attempts / "latest/driver.log").read_text())
    return driver - (attempts / "latest").lstat().st_mtime, (attempts / "latest/bringup").stat().st_mtime - driver


def floor_seconds(nodes: int, here: Path) -> float:
    """What Ray alone takes."""
    (here / "floor.sh").write_text(FLOOR)
    done = subprocess.run(
        ["sbatch", "--parsable", f"-N{nodes}", "floor.sh"], cwd=here, check=True, capture_output=True, text=True
    )
    job_id = done.stdout.strip()
    deadline = time.monotonic() + 300
    while subprocess.run(["squeue", "-h", "-j", job_id], capture_output=True, text=True).stdout.strip():
        assert time.monotonic() < deadline, f"job {job_id} does not end"
        time.sleep(0.5)
    return float((here / f"seconds.{job_id}").read_text())


def measure(counts: list[int], repeat: int, here: Path) -> list[dict[str, float]]:
    """Medians, the two taken in turns so that both meet the same other load."""
    rows = []
    for nodes in counts:
        ups, downs, floors = [], [], []
        for _ in range(repeat):
            floors.append(floor_seconds(nodes, here))
            up, down = slurmkit_seconds(nodes, here)
            ups.append(up)
            downs.append(down)
        row = {"nodes": nodes, "bringup_s": statistics.median(ups), "bare_ray_s": statistics.median(floors)}
        row |= {"ratio": row["bringup_s"] / row["bare_ray_s"], "teardown_s": statistics.median(downs)}
        rows.append(row)
        print(
            "{nodes:5d} {bringup_s:11.1f} {bare_ray_s:12.1f} {ratio:8.2f} {teardown_s:12.2f}".format(**row), flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cluster = ["--name", f"bench{os.getpid()}"]
    shared = ["--shared", str(REPOSITORY)] if REPOSITORY.is_relative_to("/tmp") else []
    subprocess.run([DEVCLUSTER, "up", *cluster, "--nodes", str(max(options.nodes)), *shared], check=True)
    try:
        line = subprocess.run([DEVCLUSTER, "env", *cluster], check=True, capture_output=True, text=True).stdout
        os.environ["SLURM_CONF"] = re.sub(r".*SLURM_CONF=", "", line).strip()
        with tempfile.TemporaryDirectory(dir="/var/tmp") as here:
            print("nodes   bring-up s   bare Ray s    ratio   teardown s")
            rows = measure(options.nodes, options.repeat, Path(here))
    finally:
        subprocess.run([DEVCLUSTER, "down", *cluster], check=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
