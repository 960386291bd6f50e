"""Prints everything that a running Ray can tell about itself, as JSON: name -> base64 of the raw answers.

These are the sources of Ray's state API (ray.util.state.state_manager), which itself needs a dashboard: the tables of
the GCS, its key-value store, and each node's runtime environment agent. Runs on a node with RAY_ADDRESS,
RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH set.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ray._raylet import GcsClient, GcsClientOptions, GlobalStateAccessor

# Of ray/_private/ray_constants.py; None is the default one. A GCS does not list them.
NAMESPACES = [None, b"job", b"dashboard", b"fun", b"tracing", b"ray_pdb", b"session", b"cluster", b"healthcheck"]


def everything(address: str) -> Iterator[tuple[str, bytes]]:
    """Each source by name, with its raw answer."""
    state = GlobalStateAccessor(GcsClientOptions.create(address, None, True, False))
    assert state.connect()
    yield "actors", b"\n".join(state.get_actor_table(None, None))
    yield "jobs", b"\n".join(state.get_job_table())
    yield "workers", b"\n".join(state.get_worker_table())
    yield "placement groups", b"\n".join(state.get_placement_group_table())
    yield "tasks", b"\n".join(state.get_task_events())
    yield "configuration", str(state.get_system_config()).encode()
    client = GcsClient(address=address)
    keys = [(key, space) for space in NAMESPACES for key in client.internal_kv_keys(b"", space)]
    yield (
        "key-value store",
        b"\n".join(key + b"\n" + (client.internal_kv_get(key, space) or b"") for key, space in keys),
    )
    nodes = client.get_all_node_info().values()
    yield "nodes", b"\n".join(node.SerializeToString() for node in nodes)
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    for node in nodes:
        agent = f"http://{node.node_manager_address}:{node.runtime_env_agent_port}/get_runtime_envs_info"
        request = urllib.request.Request(agent, data=b"", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=20) as reply:
            yield f"runtime environments of {node.node_manager_hostname}", reply.read()


if __name__ == "__main__":
    print(json.dumps({name: base64.b64encode(data).decode() for name, data in everything(os.environ["RAY_ADDRESS"])}))
