"""The conversations that a run kept token by token: which of them fit a page, and what is wrong with the others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_NUMBERED = re.compile(r"step_(\d+)\.jsonl")


class KeptStep(NamedTuple):
    """One step's episodes, as samples/step_N.jsonl has them."""

    step: int
    episodes: list[dict[str, Any]]


class Kept(NamedTuple):
    """The steps that a page shows, in order, and one line for each that it does not."""

    steps: list[KeptStep]
    left_out: list[str]


def read_samples(run_directory: Path, *, most_steps: int, most_bytes: int) -> Kept:
    """The newest step, the first, and others evenly between, as far as the limits go."""
    found = {
        int(match[1]): path
        for path in (run_directory / "samples").glob("step_*.jsonl")
        if (match := _NUMBERED.fullmatch(path.name))
    }
    steps, left_out, read = sorted(found), list[str](), list[KeptStep]()
    chosen = _evenly(steps, most_steps)
    if len(chosen) < len(steps):
        left_out.append(f"{len(steps) - len(chosen)} of {len(steps)} steps are in the folder samples/ only")
    for step in chosen:
        name = f"samples/{found[step].name}"
        try:
            data = found[step].read_bytes()
        except OSError as error:
            left_out.append(f"{name} cannot be read: {error.strerror}")
            continue
        if len(data) > most_bytes:
            left_out.append(f"{name} is too large for a page ({len(data) / 1e6:.1f} MB)")
            continue
        most_bytes -= len(data)
        episodes = [episode for line in data.splitlines() if (episode := _episode(line))]
        if episodes:
            read.append(KeptStep(step, episodes))
        if len(episodes) < len(data.splitlines()):
            left_out.append(f"{name}: {len(data.splitlines()) - len(episodes)} lines are not episodes")
    return Kept(sorted(read, key=lambda each: each.step), left_out)


def _evenly(steps: list[int], most: int) -> list[int]:
    """The last of them first, then the first, then those between."""
    if len(steps) <= most:
        return steps[::-1]
    places = {round(place * (len(steps) - 1) / (most - 1)) for place in range(most)}
    last, first, *between = [steps[-1], steps[0], *(steps[place] for place in sorted(places)[1:-1])]
    return [last, first, *between]


def _episode(line: bytes) -> dict[str, Any] | None:
    """An episode whose samples have as many entries in each list as tokens, None for anything else."""
    try:
        episode = json.loads(line)
        is_whole = isinstance(episode["reward"], int | float) and all(map(_is_sample, episode["samples"]))
    except (ValueError, KeyError, TypeError):
        return None
    return episode if is_whole else None


def _is_sample(sample: Mapping[str, Any]) -> bool:
    lists = [sample[name] for name in ("tokens", "mask", "logprobs", "advantages")]
    return all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists)
