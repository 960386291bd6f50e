"""`python -m slurmkit.grpo.export RUN TARGET [--step best|latest|N] [--dtype bfloat16]`: a checkpoint's model, alone.

Exit codes: 0 exported; 1 it is damaged, or cannot be written; 2 the user's mistake. Without --dtype no torch is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurmkit.errors import Failure, SlurmkitError, UserError
from slurmkit.grpo.checkpoint import flush, problem_of, step_of

DTYPES = ("float32", "bfloat16", "float16")
_INDEX = "model.safetensors.index.json"


def export(source: Path, target: Path, *, step: str | None = None, dtype: str | None = None) -> Path:
    """Write a checkpoint's model to the new folder `target`, which `from_pretrained` and vLLM open. The checkpoint.

    `source` is a run directory, of which `step` is `best`, `latest` or a number, or the folder of a checkpoint. Left
    out, `step` is the best where the run knows which that is, else the latest. UserError where there is no such
    checkpoint or `target` exists; Failure where the checkpoint is damaged or a disk is full. `target` is complete or
    not there.
    """
    checkpoint = checkpoint_of(source, step)
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already; slurmkit export writes to a new folder only")
    if problem := problem_of(checkpoint, "model/"):
        raise Failure(f"{checkpoint} is damaged: {problem}")
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if dtype is None:
            shutil.copytree(checkpoint / "model", unfinished, copy_function=shutil.copyfile)
        else:
            _convert(checkpoint / "model", unfinished, dtype)
        flush(unfinished)
        os.replace(unfinished, target)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise Failure(f"{target} cannot be written: {error}") from error
    return checkpoint


def checkpoint_of(source: Path, step: str | None) -> Path:
    """The folder of the checkpoint that `source` and `step` name, as in `export`. UserError where there is none."""
    if (source / "manifest.json").is_file():
        if step is not None:
            raise UserError(f"--step {step}: {source} is a checkpoint itself; name its run, or leave --step out")
        return source
    found = (path.parent for path in source.glob("step_*/manifest.json") if path.parent.name[5:].isdigit())
    there = sorted(found, key=step_of)
    if not there:
        raise UserError(f"{source} holds no checkpoint")
    has_best = (source / "best").is_dir()
    if step is None:
        step = "best" if has_best else "latest"
    if step == "latest":
        return there[-1]
    if step == "best" and has_best:
        return (source / "best").resolve()
    names = [path.name.removeprefix("step_") for path in there]
    if step not in names:
        hint = " (none has the metric of checkpointing.metric_name)" if step == "best" else ""
        raise UserError(f"--step {step}: no such checkpoint in {source}{hint}; there are {', '.join(names)} and latest")
    return source / f"step_{step}"


def _convert(model: Path, folder: Path, dtype: str) -> None:
    """Copy a model's folder, with every floating-point tensor in another type; one file at a time in memory."""
    try:
        import torch
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise UserError(f"--dtype {dtype}: needs {error.name}, which is not installed here: slurmkit[train]") from None

    kind, total = getattr(torch, dtype), 0
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"), copy_function=shutil.copyfile)
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no dictionary
            metadata = file.metadata()
        tensors = {name: each.to(kind) if each.is_floating_point() else each for name, each in tensors.items()}
        total += sum(each.nbytes for each in tensors.values())
        try:
            save_file(tensors, folder / path.name, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        shutil.copymode(folder / "config.json", folder / path.name)  # safetensors lets nobody else read it
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(_retyped(config, dtype) | {"dtype": dtype}, indent=2) + "\n")
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = total
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _retyped(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json, those of a model's parts inside it included."""
    return {
        name: dtype
        if name in ("dtype", "torch_dtype")
        else _retyped(value, dtype)
        if isinstance(value, dict)
        else value
        for name, value in config.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurmkit.grpo.export", description="Export a checkpoint's model.")
    parser.add_argument("run", type=Path, help="a run directory, or a checkpoint's folder")
    parser.add_argument("target", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--step", help="best, latest or a number")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; left out, as they were trained")
    options = parser.parse_intermixed_args(arguments)
    try:
        checkpoint = export(options.run, options.target, step=options.step, dtype=options.dtype)
    except SlurmkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"exported {checkpoint} to {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
