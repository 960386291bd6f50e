"""The run in W&B: one for all attempts, with the figures of metrics.jsonl, conversations, and the job's own files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slurmkit.config.schema import TrainConfig

_ROWS = 32
"""The most that a table has."""
_CHARS = 16_000
"""The most of one conversation: of a longer one, half of that from its beginning and half from its end."""
_COLUMNS = ("step", "task", "reward", "correct", "finish_reason", "turns", "conversation")
_FILES = ("job.sbatch", "config.yaml", "settled.json", "run.json", "attempts/*/start.json", "attempts/*/end.json")
"""Of the run directory. They hold the names of secrets and none of their values, and no environment."""


class WandbRun:
    """One attempt of it. Offline, all that an upload needs lies in wandb/ of the run directory."""

    def __init__(self, run_directory: Path, config: TrainConfig) -> None:
        folder = run_directory / "wandb"
        folder.mkdir(exist_ok=True)
        # Else what is to be uploaded would wait in a home directory, which may be the container's.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "data"))
        import wandb

        # In the run directory and not in a checkpoint: an attempt that dies before its first save is the same run, too.
        id_file = folder / "run_id"
        if not id_file.exists():
            beside = id_file.with_name(".run_id.unfinished")
            beside.write_text(secrets.token_hex(4))
            os.replace(beside, id_file)
        asked = config.logger.wandb
        self._run = wandb.init(
            **asked.model_dump(),
            id=id_file.read_text(),
            resume="allow",
            dir=run_directory,
            config=config.model_dump(mode="json"),
            # Nothing of the environment: the command line and the git state may hold what is private.
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                silent=True,
            ),
        )
        self._shown: dict[str, list[tuple[Any, ...]]] = {}
        self._table([])  # the first one imports pandas, which takes a second or more
        self._keep_files(run_directory)

    def show(self, name: str, path: Path) -> None:
        """Have the next step's line come with a table of the conversations in a file of validation/ or samples/."""
        with path.open(encoding="utf-8") as file:
            rows = [_row(json.loads(line)) for _, line in zip(range(_ROWS), file, strict=False)]
        self._shown[f"{name}:conversations"] = rows

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Everything that is known of one step, once."""
        tables = {name: self._table([(step, *row) for row in rows]) for name, rows in self._shown.items()}
        self._shown.clear()
        self._run.log({**metrics, **tables}, step=step)

    def finish(self, exit_code: int) -> None:
        """Tell how the attempt ended. Online, this waits until all is uploaded."""
        self._run.finish(exit_code=exit_code)

    def _table(self, rows: list[tuple[Any, ...]]) -> Any:
        import wandb

        return wandb.Table(columns=list(_COLUMNS), data=[list(row) for row in rows])

    def _keep_files(self, run_directory: Path) -> None:
        """As an artifact whose versions are the attempts."""
        import wandb

        found = sorted(path for pattern in _FILES for path in run_directory.glob(pattern) if path.is_file())
        if not found:
            return  # whoever starts the trainer alone has none
        artifact = wandb.Artifact(f"slurmkit-{self._run.id}", type="slurmkit")
        for path in found:
            artifact.add_file(str(path), name=str(path.relative_to(run_directory)))
        self._run.log_artifact(artifact)


def _row(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """A line of validation/ or samples/ as a row, without its step."""
    if "messages" in line:
        turns = sum(message["role"] == "assistant" for message in line["messages"])
        text, reason = "\n\n".join(map(_said, line["messages"])), line["finish_reason"]
    else:
        samples = line["samples"]
        turns = sum(_replies(sample["mask"]) for sample in samples)
        text, reason = "\n\n".join("".join(sample["tokens"]) for sample in samples), samples[-1]["finish_reason"]
    return line["task"], float(line["reward"]), bool(line["correct"]), reason, turns, _short(text)


def _said(message: Mapping[str, Any]) -> str:
    """A message and its calls, as people read them."""
    who = " ".join(filter(None, (message["role"], message.get("name"))))
    calls = [f"-> {call['name']}({call['arguments']})" for call in message.get("tool_calls", ())]
    return "\n".join([f"[{who}]", *filter(None, (message["content"],)), *calls])


def _replies(mask: list[int]) -> int:
    """Stretches of ones: what the model said without being answered."""
    return sum(now > before for before, now in zip([0, *mask], mask, strict=False))


def _short(text: str) -> str:
    if len(text) <= _CHARS:
        return text
    half = _CHARS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
