"""The run directory: everything that a run leaves behind, in one obvious place.

results/NAME/
    job.sbatch        what was submitted
    config.yaml       the settled training configuration
    settled.json      the job's and the configuration's values, and where each was set
    run.json          name, digests, and one record per attempt
    slurm-JOBID.out   the job's own output
    metrics.jsonl     one line per step; step_N/ checkpoints; plots/; samples/; validation/; wandb/
    attempts/JOBID.RESTART/{driver.log,node-HOST.log}, attempts/latest
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurmkit.config.validate import shown
from slurmkit.errors import Failure, UserError

if TYPE_CHECKING:
    from slurmkit.config.schema import TrainConfig
    from slurmkit.job.settle import Settled


def write_beside(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never half of it."""
    write_together({path: text})


def write_together(files: Mapping[Path, str]) -> None:
    """Write several files as `write_beside` does one; where one cannot be written, none is changed."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    kept = {path: path.with_name(f".{path.name}.{os.getpid()}.old") for path in files}
    done: list[Path] = []
    path = next(iter(files))
    try:
        for path, text in files.items():
            beside[path].write_text(text, encoding="utf-8")
        for path in files:
            if len(files) > 1 and path.is_file():
                kept[path].write_bytes(path.read_bytes())
            os.replace(beside[path], path)
            done.append(path)
    except OSError as error:
        for written in done:
            if kept[written].exists():
                os.replace(kept[written], written)
            else:
                written.unlink()
        raise Failure(f"{path} cannot be written: {error.strerror}") from None
    finally:
        for left in (*beside.values(), *kept.values()):
            left.unlink(missing_ok=True)


def jobs_of(run: Path) -> set[str]:
    """The ids of all jobs that the run ever had, follow-ups included, from its files alone."""
    found = {str(each["job_id"]) for each in recorded(run) if "job_id" in each}
    for folder in attempt_folders(run):
        found.add(folder.name.partition(".")[0])
        found |= {following} if (following := next_job(folder)) else set()
    return {job_id for job_id in found if job_id.isdigit()}


def recorded(run: Path) -> list[dict[str, Any]]:
    """What run.json has of each attempt that was submitted, or run here, by hand."""
    attempts = (read_json(run / "run.json") or {}).get("attempts")
    return [each for each in attempts if isinstance(each, dict)] if isinstance(attempts, list) else []


def attempt_folders(run: Path) -> list[Path]:
    """JOBID.RESTART and local-N, in no order."""
    try:
        with os.scandir(run / "attempts") as entries:
            return [
                Path(entry.path)
                for entry in entries
                if re.fullmatch(r"\d+\.\d+|local-\d+", entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []


def next_job(attempt: Path) -> str | None:
    """The follow-up that an attempt has queued."""
    try:
        text = (attempt / "next").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if text.isdigit() else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A record; None where it is missing, or not whole: whoever watches a run must not fall over what broke it."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write what `read_json` reads."""
    write_beside(path, json.dumps(record) + "\n")


def files_of(settled: Settled) -> dict[str, str]:
    """What the run directory says of how a run was settled, by the files' names."""
    values = {"settled.json": json.dumps(settled.as_json(), indent=1) + "\n"}
    return values if settled.spec.config is None else {"config.yaml": settled.spec.config, **values}


class RunDirectory:
    """One run's folder. `prepare` makes it, `undo` takes back what a refused submission made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []
        self._replaced: dict[Path, str] = {}

    @property
    def record(self) -> dict[str, Any] | None:
        """run.json, or None where no run was recorded yet."""
        path = self.path / "run.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise Failure(f"{path} cannot be read: {error}") from None
        assert isinstance(record, dict)
        return record

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """One record per attempt so far."""
        return list((self.record or {}).get("attempts", []))

    def refuse_other(self, settled: Settled) -> None:
        """A name belongs to one run: going on is an attempt, anything else needs a name of its own.

        A training run goes on where what is trained is the same (config/resume.py), a command where it is the same.
        """
        record = self.record
        if record is None or record["identity"] == settled.identity:
            return
        needs = "Give this one a name of its own (--name), or remove that directory"
        if settled.train is None or record["identity"].keys() != settled.identity.keys():
            raise UserError(f"{self.path} holds a run with another {' or '.join(record['identity'])}. {needs}")
        problems = [
            f"{key}: {shown(new)} ({settled.config_origins.get(key, 'default')}), and the run has {shown(old)}"
            for key, old, new in self._differences(settled.train)
        ]
        if problems:
            lines = [f"{self.path} holds a run that is trained otherwise:", *problems]
            raise UserError("\n".join([*lines, f"It goes on only without these changes. {needs}"]))

    def _differences(self, train: TrainConfig) -> list[tuple[str, Any, Any]]:
        from slurmkit.config.resume import differences  # and PyYAML, which most submissions do without
        from slurmkit.config.source import read_yaml

        # Without one the run never started: there is nothing to go on with.
        path = self.path / "config.yaml"
        return differences(read_yaml(path).data, train.model_dump(mode="json")) if path.exists() else []

    def prepare(self, files: Mapping[str, str]) -> None:
        """Make the folder and write its files, each beside and renamed."""
        folder = self.path / "attempts"
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._made += [self.path / name for name in files if not (self.path / name).exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run directory {self.path} cannot be made: {error.strerror}") from None
        for name, text in files.items():
            path = self.path / name
            if path not in self._made:
                self._replaced[path] = path.read_text(encoding="utf-8")
            write_beside(path, text)

    def undo(self) -> None:
        """Take back what `prepare` did: a refused submission leaves nothing."""
        for path, text in self._replaced.items():
            write_beside(path, text)
        for path in sorted(self._made, reverse=True):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)

    def add_attempt(self, identity: Mapping[str, str], attempt: Mapping[str, Any]) -> None:
        """Record an attempt: with it, the run exists."""
        record = {"identity": dict(identity), "attempts": [*self.attempts, dict(attempt)]}
        write_beside(self.path / "run.json", json.dumps(record, indent=2) + "\n")
