"""One page of a run, or of several side by side: a file that needs no server, no network and no other file.

What models, environments and users wrote is data in it: text that Jinja escapes, or JSON in which no tag can begin and
which the page's script only ever puts into text nodes. The page's Content-Security-Policy lets nothing run but that one
script, by its hash, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slurmkit.errors import Failure, UserError
from slurmkit.report.rows import PHASES, Rows, read_rows
from slurmkit.report.samples import read_samples

_HERE = Path(__file__).parent
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
# Of figures in the page: more than a screen can show, and half the bytes of all of them.
_DIGITS = 6
# Conversations in a page: enough to see how they change, and few enough to open at once.
_MOST_STEPS, _MOST_BYTES = 12, 8_000_000


@dataclass(frozen=True, slots=True)
class AttemptFacts:
    """One attempt in words."""

    name: str
    job_id: str
    nodes: str
    started: str
    took: str
    end: str
    is_good: bool
    """Whether it ended in order."""
    bad_nodes: Sequence[str]
    folder: Path


@dataclass(frozen=True, slots=True)
class RunFacts:
    """How a run stands, in words."""

    name: str
    path: Path
    state: str
    reason: str
    facts: Mapping[str, str]
    """What stands at the head of the page, by its label."""
    attempts: Sequence[AttemptFacts]


@dataclass(frozen=True, slots=True)
class Setting:
    """A settled value and where it was set."""

    key: str
    value: str
    origin: str


def write_page(runs: Sequence[RunFacts], page: Path) -> Path:
    """Write the page of one run, or of several beside each other.

    Example: write_page([facts], facts.path / "report.html"). Failure where it cannot be written.
    """
    text = render_page(runs, page.absolute().parent)
    beside = page.with_name(f".{page.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", errors="replace")
        os.replace(beside, page)
    except OSError as error:
        raise Failure(f"{page} cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
    return page


def render_page(runs: Sequence[RunFacts], folder: Path) -> str:
    """The page's text, its links relative to `folder`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else _visible(value),
    )
    script, style = _static("uPlot.iife.min.js", "page.js", "tokens.js"), _static("uPlot.min.css", "page.css")
    settings = [_settings(run.path) for run in runs]
    rows = [_rows(run.path) for run in runs]
    one = len(runs) == 1
    kept = read_samples(runs[0].path, most_steps=_MOST_STEPS, most_bytes=_MOST_BYTES) if one else None
    data = {
        "phases": PHASES,
        "runs": [{"name": run.name, "columns": _columns(each)} for run, each in zip(runs, rows, strict=True)],
        "samples": [each._asdict() for each in kept.steps] if kept else [],
    }
    return environment.get_template("page.html.j2").render(
        title=" · ".join(run.name for run in runs),
        runs=runs,
        figures=[{label: facts for label, *facts in _figures(each)} for each in rows],
        has_figures=any(each.rows for each in rows),
        notes=[*_notes(runs, rows, settings), *(kept.left_out if kept else [])],
        has_samples=bool(data["samples"]),
        settings=settings[0] if one else [],
        differences=[] if one else _differences(settings),
        script_of_job=_text(runs[0].path / "job.sbatch") if one else "",
        links=[_links(run, folder) for run in runs],
        logs=lambda attempt: _logs(attempt.folder, folder),
        policy=_policy(script, style),
        licence=Markup(_static("uPlot.LICENSE")),
        script=Markup(script),
        style=Markup(style),
        data=Markup(_as_script(data)),
    )


def _visible(text: str) -> str:
    """What would not be seen, or would turn the text around it, by its name; page.js does the same."""
    return _UNSEEN.sub(
        lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else f"⟨U+{ord(found[0]):04X}⟩", text
    )


def _policy(script: str, style: str) -> str:
    """Nothing but these two, and no network at all."""
    rules = {
        "default-src": "'none'",
        "script-src": f"'sha256-{_digest(script)}'",
        "style-src": f"'sha256-{_digest(style)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _static(*names: str) -> str:
    return "\n".join((_HERE / "static" / name).read_text(encoding="utf-8") for name in names)


def _as_script(data: Mapping[str, Any]) -> str:
    """JSON in which no tag, comment or entity begins; ASCII, so that no half of a surrogate pair is in it either."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rows(run: Path) -> Rows:
    """None of a run that has not begun."""
    try:
        return read_rows(run)
    except UserError:
        return Rows([], 0)


def _columns(rows: Rows) -> dict[str, list[float | None]]:
    """Each figure over the lines, null where a line has none."""
    names = dict.fromkeys(name for row in rows.rows for name in row if name != "last_step")
    return {
        name: [None if (value := row.get(name)) is None else float(f"{value:.{_DIGITS}g}") for row in rows.rows]
        for name in names
    }


def _figures(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """What stands in large digits: label, value, remark."""
    accuracy = rows.points("val:accuracy")
    if accuracy:
        best_step, best = max(accuracy, key=lambda point: (point[1], -point[0]))
        before = f"{accuracy[0][1]:.2f} before training, " if accuracy[0][0] == 0 and len(accuracy) > 1 else ""
        yield "accuracy", f"{accuracy[-1][1]:.2f}", f"{before}best {best:.2f} at step {best_step:,.0f}"
    reward, spread = rows.points("train:reward_mean"), rows.points("train:reward_std")
    if reward:
        yield "reward", f"{reward[-1][1]:.2f}", f"± {spread[-1][1]:.2f} over episodes" if spread else "training, mean"
    times = [seconds for _, seconds in rows.points("time:step")]
    if times:
        spent = {phase: sum(value for _, value in rows.points(f"time:{phase}")) for phase in PHASES}
        most = max(spent, key=lambda phase: spent[phase])
        share = f"{most} {spent[most] / sum(times):.0%}" if spent[most] > 0 else ""
        yield "seconds per step", f"{sum(times) / len(times):.2f}", share
    speeds = [value for _, value in rows.points("perf:tokens_per_sec_per_gpu")]
    if speeds:
        yield "tokens/s per GPU", f"{sum(speeds) / len(speeds):,.0f}", "mean of all steps"


def _notes(runs: Sequence[RunFacts], rows: Sequence[Rows], settings: Sequence[Sequence[Setting]]) -> Iterator[str]:
    """What the page cannot show, and why."""
    for run, each, known in zip(runs, rows, settings, strict=True):
        if each.num_unreadable:
            yield f"{run.name}: {each.num_unreadable} lines of metrics.jsonl hold no step"
        if not known:
            yield f"{run.name} has no settled.json, or none that can be read: its settings are not shown"


def _settings(run: Path) -> list[Setting]:
    """The settled job and training configuration, as far as the run directory has them."""
    try:
        record = json.loads(_text(run / "settled.json") or "{}")
    except ValueError:
        record = {}
    found = list[Setting]()
    for part, origins in (("spec", "origins"), ("config", "config_origins")):
        values, places = record.get(part), record.get(origins)
        if isinstance(values, dict) and isinstance(places, dict):
            found += [
                Setting(key, json.dumps(value, ensure_ascii=False), str(places.get(key, "default")))
                for key, value in _leaves(values)
            ]
    return found


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _differences(settings: Sequence[Sequence[Setting]]) -> list[tuple[str, list[str]]]:
    """Keys that the runs do not agree on, each with every run's value, "" where it has none."""
    if not all(settings):  # of a run before there were such records
        return []
    by_run = [{each.key: each.value for each in one} for one in settings]
    keys = dict.fromkeys(key for one in by_run for key in one)
    return [
        (key, [one.get(key, "") for one in by_run]) for key in keys if len({one.get(key, "") for one in by_run}) > 1
    ]


def _links(run: RunFacts, folder: Path) -> list[tuple[str, str]]:
    """What else the run directory holds: name and relative address."""
    names = ["metrics.jsonl", "config.yaml", "settled.json", "job.sbatch", "run.json", "plots/validation_reward.png"]
    names += ["plots/training.png", "best", "latest"]
    paths = [run.path / name for name in names] + sorted(run.path.glob("slurm-*.out"))
    return [(str(path.relative_to(run.path)), _address(path, folder)) for path in paths if path.exists()]


def _logs(attempt: Path, folder: Path) -> list[tuple[str, str]]:
    paths = [attempt / "driver.log", *sorted(attempt.glob("node-*.log"))]
    return [(path.name, _address(path, folder)) for path in paths if path.exists()]


def _address(path: Path, folder: Path) -> str:
    return quote(f"./{os.path.relpath(path.absolute(), folder)}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
