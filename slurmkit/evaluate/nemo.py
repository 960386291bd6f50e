"""NeMo Evaluator's own BFCL v3, for figures that are to be compared with others of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from slurmkit.errors import Failure, UserError
from slurmkit.evaluate import bfcl_side
from slurmkit.evaluate.bfcl import Settings
from slurmkit.evaluate.models import Model
from slurmkit.evaluate.server import vllm_server
from slurmkit.processes import end_with_parent

PROGRAM = "nemo-evaluator"
_KEY = "SLURMKIT_EVALUATE_KEY"
_DEADLINE_SECONDS = 48 * 3600.0


def command_for(base_url: str, settings: Settings, folder: Path) -> list[str]:
    """NeMo Evaluator's command, which reads the server's key from the environment."""
    words = [PROGRAM, "run_eval", "--eval_type", "bfclv3", "--model_id", bfcl_side.MODEL]
    words += ["--model_url", f"{base_url}/chat/completions", "--model_type", "chat", "--api_key_name", _KEY]
    parameters = {"parallelism": settings.concurrency, "limit_samples": settings.limit}
    given = ",".join(f"config.params.{name}={value}" for name, value in parameters.items() if value is not None)
    return [*words, "--output_dir", str(folder), "--overrides", given]


def evaluate(settings: Settings, model: Model, folder: Path, say: Callable[[str], None]) -> Path:
    """Print NeMo Evaluator's command, and run it against a server of ours. Its results.yml.

    UserError, the command having been printed, where it is not installed; Failure where it fails.
    """
    if shutil.which(PROGRAM) is None:
        say(shlex.join(command_for("http://127.0.0.1:PORT/v1", settings, folder)))
        raise UserError(
            f"{PROGRAM} is not installed here, so the command above was not run: install nvidia-bfcl in an environment "
            "of its own, and put its bin into PATH"
        )
    folder.mkdir(parents=True)
    log = folder / "server.log"
    say(f"serving {model.name}; vLLM's log is {log}")
    arguments = settings.server_arguments
    with vllm_server(model.path, bfcl_side.MODEL, arguments, log, deadline_seconds=settings.server_timeout) as server:
        words = command_for(server.base_url, settings, folder)
        say(shlex.join(words))
        _run(words, server.api_key)
    return folder / "results.yml"


def _run(words: list[str], api_key: str) -> None:
    try:
        done = subprocess.run(
            words, env={**os.environ, _KEY: api_key}, timeout=_DEADLINE_SECONDS, preexec_fn=end_with_parent
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{PROGRAM} has not ended after {_DEADLINE_SECONDS:g} s") from None
    if done.returncode:
        raise Failure(f"{PROGRAM} ended with exit code {done.returncode}; what it said is above")
