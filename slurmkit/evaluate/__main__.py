"""`python -m slurmkit.evaluate OPTIONS`, as JSON: what `slurmkit evaluate` starts. Exit codes are slurmkit's."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slurmkit import __version__
from slurmkit.config.load import load_config
from slurmkit.errors import SlurmkitError, UserError
from slurmkit.evaluate.bfcl_scores import chosen
from slurmkit.evaluate.installation import bfcl_python
from slurmkit.evaluate.models import Model, find_baseline, find_model
from slurmkit.evaluate.place import keep, place_for
from slurmkit.grpo.private_ray import protect_private_ray
from slurmkit.report.table import Table


def main(options: dict[str, Any]) -> None:
    """Evaluate as asked, keep the result, and print it."""
    # What is wrong with the input is said before anything heavy is imported.
    model = find_model(Path(options["checkpoint"]), options["step"])
    path = place_for(model, options["what"], options["name"])
    work = {"env": _environment, "bfcl": _bfcl}[options["what"]]
    with redirect_stdout(sys.stderr):  # progress
        found = work(model, path, options)
    if found is None:
        return
    result, header, rows, notes = found
    models = {side: each.record() for side, each in _models(model, options).items()}
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"models": models, **result, "slurmkit": __version__, "time": moment}
    keep(path, result)
    if options["json"]:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    for side, each in models.items():
        print(f"{side:<11}{each['name']}")
    Table(header, list(rows)).show()
    for note in notes:
        print(note)
    print(f"kept in {path}")


_Found = tuple[dict[str, Any], Sequence[str], Iterable[list[str]], Iterable[str]]


def _models(model: Model, options: Mapping[str, Any]) -> dict[str, Model]:
    baseline = options["baseline"]
    return {"checkpoint": model, **({"baseline": find_baseline(baseline)} if baseline else {})}


def _environment(model: Model, path: Path, options: Mapping[str, Any]) -> _Found:
    overrides = list(options["overrides"])
    if options["episodes"] is not None:
        overrides.append(f"grpo.val_num_generations_per_prompt={options['episodes']}")
    given = options["config"]
    if given is None and model.run is None:
        raise UserError(f"{model.path}: is from no run, so give the configuration with --config FILE")
    config = load_config(Path(given) if given else model.path.parent / "config.json", overrides)
    protect_private_ray()
    models = _models(model, options)
    from slurmkit.evaluate import environment

    result = environment.evaluate(config, models)
    notes = [
        f"{config.env.name}, {len(result['tasks'])} tasks, {result['episodes_per_task']} episodes of each, temperature "
        f"{config.policy.generation.temperature:g}; 95 % intervals over tasks"
    ]
    return result, ("", *result["figures"]), environment.rows(result), notes


def _bfcl(model: Model, path: Path, options: Mapping[str, Any]) -> _Found | None:
    from slurmkit.evaluate import bfcl, nemo

    given = {name: options[name] for name in bfcl.Settings.__dataclass_fields__ if options.get(name) is not None}
    settings = bfcl.Settings(**{**given, "categories": chosen(options["categories"])})
    if options["nemo_evaluator"]:
        print(f"kept in {nemo.evaluate(settings, model, path.with_suffix(''), _say)}")
        return None
    python = bfcl_python(options["bfcl_python"] and Path(options["bfcl_python"]), Path(options["cache"]), _say)
    models = _models(model, options)
    result = bfcl.evaluate(settings, models, python, path.with_suffix(""), _say)
    settled = {name: getattr(settings, name) for name in bfcl.Settings.__dataclass_fields__}
    header = ("category", "entries", *result["figures"])
    return {**result, "settings": settled}, header, bfcl.rows(result), bfcl.notes(result)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # As Ctrl-C: whatever was started is ended first.
    signal.signal(signal.SIGTERM, _leave)
    try:
        main(json.loads(sys.argv[1]))
    except SlurmkitError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted: there is no result")
        sys.exit(130)
