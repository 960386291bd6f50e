"""A driver that leaks each of its secrets in another way, so that a search can show that it finds them all."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import ray
import wandb
from ray.experimental.internal_kv import _internal_kv_put

secret = {name: value for name, value in os.environ.items() if name.startswith("LEAK_")}


class Leaking:
    """On the other node."""

    def leak(self) -> str:
        print("into Ray's own log of this worker", secret["LEAK_WORKER_LOG"], flush=True)
        Path("/tmp/leak").write_bytes(b"\x08\x01" + base64.b64encode(b"key " + secret["LEAK_NODE_FILE"].encode()))
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", secret["LEAK_ARGUMENT"]])
        return socket.gethostname()


ray.init(log_to_driver=False, runtime_env={"env_vars": {"COPIED": secret["LEAK_RUNTIME_ENV"]}})
_internal_kv_put("leak", secret["LEAK_KEY_VALUE"])
other = next(node["NodeID"] for node in ray.nodes() if node["NodeManagerHostname"] == "node2")
where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(other, soft=False)
actor = ray.remote(Leaking).options(name=secret["LEAK_ACTOR_NAME"], scheduling_strategy=where, num_cpus=0.1).remote()
assert ray.get(actor.leak.options(name=secret["LEAK_TASK_NAME"]).remote()) == "node2"
print("into the driver's log", secret["LEAK_DRIVER_LOG"], flush=True)
run = wandb.init(mode="offline", dir=".", config={"key": secret["LEAK_WANDB"]}, settings=wandb.Settings(silent=True))
run.log({"a": 1})
run.finish()
Path.home().joinpath(".cache", f"leak-{os.environ['SLURM_JOB_ID']}").write_text(secret["LEAK_HOME"])
Path("leaked").touch()
time.sleep(300)
