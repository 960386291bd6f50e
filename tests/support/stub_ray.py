"""Stands in for `ray start` in a job whose test is about Slurm, files or exit codes: no second of start-up."""

from __future__ import annotations

import sys
from pathlib import Path

# What the bring-up expects of `ray start`: its folder and address, and processes named as Ray's.
_RAY = """#!/bin/bash
set -euo pipefail
[[ $1 == start ]] || { echo "stub ray: only start" >&2; exit 2; }
here=$(dirname "$0") address="" is_head=""
for word in "$@"; do
  case $word in
    --temp-dir=*) folder=${word#*=} ;;
    --node-ip-address=*) ip=${word#*=} ;;
    --address=*) address=${word#*=} ;;
    --head) is_head=1 ;;
  esac
done
mkdir -p "$folder/session_latest/logs"
touch "$folder/session_latest/logs/raylet.out"
if [[ -n $is_head ]]; then
  setsid "$here/gcs_server" infinity </dev/null &>/dev/null &
  address=$ip:$((20000 + $$ % 10000))
fi
setsid "$here/raylet" infinity </dev/null &>/dev/null &
until [[ $(</proc/$!/comm) == raylet ]]; do sleep 0.01; done
echo "$address" >"$folder/ray_current_cluster"
"""


def make_stub_ray(folder: Path) -> Path:
    """Write it into a folder that all nodes see. Returns the Python to submit with: its folder comes first on PATH."""
    for name, text in (("ray", _RAY), ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("raylet", "gcs_server"):
        (folder / name).symlink_to("/bin/sleep")
    return folder / "python"
