"""BFCL v3 with one model or two: bfcl-eval, in an environment of its own, asks vLLM's server."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from slurmkit.errors import Failure
from slurmkit.evaluate import bfcl_side
from slurmkit.evaluate.bfcl_scores import GROUPS, group_scores, missing
from slurmkit.evaluate.intervals import CONFIDENCE, difference, estimate
from slurmkit.evaluate.models import Model
from slurmkit.evaluate.server import vllm_server
from slurmkit.processes import end_with_parent

_DEADLINE_SECONDS = 48 * 3600.0
_POLL_SECONDS = 0.5
_LAST_LINES = 15

# Of one category: its `size`, and of each entry, by id, whether it is `correct`, and the `error` of its request.
Answers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked, and how. `limit` counts entries of each category, `max_tokens` those of a reply."""

    categories: Sequence[str]
    limit: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    concurrency: int = 32
    tool_parser: str = "hermes"
    dtype: str = "bfloat16"
    vllm_arguments: Sequence[str] = ()
    server_timeout: float = 1800.0

    @property
    def server_arguments(self) -> list[str]:
        """For vLLM."""
        tools = ["--enable-auto-tool-choice", "--tool-call-parser", self.tool_parser]
        return [*tools, "--dtype", self.dtype, "--seed", str(self.seed), *self.vllm_arguments]


def evaluate(
    settings: Settings, models: Mapping[str, Model], python: Path, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Serve `checkpoint`, and perhaps `baseline`, one after the other, and ask each the same entries.

    `python` has bfcl-eval; `folder` is a new one for its files and the logs. Failure where a server does not come up or
    dies, where bfcl-eval does, or where not one request of a model went well.
    """
    answers = {}
    for side, model in models.items():
        here = folder / side
        here.mkdir(parents=True)
        say(f"serving {model.name}; vLLM's log is {here / 'server.log'}")
        arguments, log = settings.server_arguments, here / "server.log"
        serving = vllm_server(model.path, bfcl_side.MODEL, arguments, log, deadline_seconds=settings.server_timeout)
        with serving as server:
            say(f"asking {len(settings.categories)} categories; bfcl-eval's log is {here / 'bfcl.log'}")
            answers[side] = ask(settings, python, here, server.base_url, server.api_key, server.check)
        for line in remarks(answers[side]):
            say(f"warning: {model.name}: {line}")
    return compared(answers, settings)


def ask(
    settings: Settings, python: Path, folder: Path, base_url: str, api_key: str, check: Callable[[], None]
) -> Answers:
    """What bfcl-eval says of each entry. `check` raises where there is nobody left to ask.

    Failure where bfcl-eval fails or not one request went well.
    """
    work, log, results = folder / "bfcl", folder / "bfcl.log", folder / "answers.json"
    work.mkdir()
    own = {name: getattr(settings, name) for name in ("categories", "limit", "seed", "max_tokens", "concurrency")}
    environment = {**os.environ, "OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": api_key}
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    # Isolated: of this environment it sees nothing, not even the files beside its own.
    command = [str(python), "-I", bfcl_side.__file__]
    with log.open("wb") as errors, results.open("wb") as output:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            preexec_fn=end_with_parent,
        )
        try:
            assert child.stdin is not None
            with suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps({**own, "folder": str(work)}).encode())
            until = time.monotonic() + _DEADLINE_SECONDS
            while child.poll() is None:
                check()
                if time.monotonic() > until:
                    raise Failure(f"bfcl-eval has not ended after {_DEADLINE_SECONDS:g} s, see {log}")
                time.sleep(_POLL_SECONDS)
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        lines = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
        raise Failure(f"bfcl-eval ended with exit code {child.returncode}; the last lines of {log}:\n{lines}")
    found: Answers = json.loads(results.read_text())
    refuse_silence(found)
    return found


def refuse_silence(answers: Answers) -> None:
    """Failure where not one request went well: then nothing was judged."""
    errors = [entry["error"] for category in answers.values() for entry in category["entries"].values()]
    if all(errors):
        raise Failure(f"not one of {len(errors)} requests went well; the first: {errors[0]}")


def remarks(answers: Answers) -> Iterator[str]:
    """A line for each category with requests that failed: bfcl-eval takes those for replies without a call."""
    for category, found in answers.items():
        errors = [entry["error"] for entry in found["entries"].values() if entry["error"]]
        if errors:
            first = errors[0].splitlines()[0]
            yield f"{category}: {len(errors)} of {len(found['entries'])} requests failed, the first with: {first}"


def compared(answers: Mapping[str, Answers], settings: Settings) -> dict[str, Any]:
    """Each category's accuracy on each side, the groups' scores and what is missing for the overall."""
    figures: dict[str, Any] = {}
    for side, found in answers.items():
        correct = {category: _correct(each) for category, each in found.items()}
        sizes = {category: each["size"] for category, each in found.items()}
        means = {category: fmean(values) for category, values in correct.items()}
        figures[side] = {
            "categories": {category: estimate(values, settings.seed).record() for category, values in correct.items()},
            "failed_requests": {
                category: sum(entry["error"] is not None for entry in each["entries"].values())
                for category, each in found.items()
            },
            "scores": group_scores(means, sizes),
        }
    if "baseline" in answers:
        ours, theirs = answers["checkpoint"], answers["baseline"]
        scores = [figures[side]["scores"] for side in ("checkpoint", "baseline")]
        figures["difference"] = {
            "categories": {
                category: difference(_correct(ours[category]), _correct(theirs[category]), settings.seed).record()
                for category in ours
            },
            "scores": {name: scores[0][name] - scores[1][name] for name in scores[0]},
        }
    asked = answers["checkpoint"]
    entries = {name: {"size": each["size"], "asked": len(each["entries"])} for name, each in asked.items()}
    return {
        "benchmark": "BFCL v3",
        "confidence": CONFIDENCE,
        "entries": entries,
        "figures": figures,
        "missing_for_overall": missing(asked),
        "is_estimate": any(each["asked"] < each["size"] for each in entries.values()),
    }


def _correct(found: Mapping[str, Any]) -> list[float]:
    """1 or 0 of each entry, in the order of their ids, which is the same for all models."""
    return [float(entry["correct"]) for _, entry in sorted(found["entries"].items())]


def rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row for each category, and for each group that is whole."""
    figures = result["figures"]
    for group, categories in GROUPS.items():
        for category in categories:
            if (asked := result["entries"].get(category)) is not None:
                cells = (figures[side]["categories"][category] for side in figures)
                shown = [f"{each['mean']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in cells]
                yield [category, f"{asked['asked']}/{asked['size']}", *shown]
        if all(group in figures[side]["scores"] for side in figures):
            yield [group, "", *(f"{figures[side]['scores'][group]:.3f}" for side in figures)]
    if all("overall" in figures[side]["scores"] for side in figures):
        yield ["overall", "", *(f"{figures[side]['scores']['overall']:.3f}" for side in figures)]


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What has to be said beside the table."""
    if result["missing_for_overall"]:
        yield f"no overall: {', '.join(result['missing_for_overall'])} are missing"
    elif result["is_estimate"]:
        yield "groups and overall are estimates: not all entries were asked (--limit)"
