"""What a step trained on, token by token, for people to read: samples/step_N.jsonl of the run directory.

A line is an episode: its task, reward, and the samples that were made of it, in order. Of a sample there is one entry
per token in `tokens` (what the token adds to the text), `mask` (1 where the loss counts it), `logprobs` (of the
distribution that it was sampled from, null where the mask is 0) and `advantages`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slurmkit.errors import Failure
from slurmkit.rollout.chat import Chat
from slurmkit.rollout.episode import Episode
from slurmkit.rollout.sample import Sample

_DIGITS = 4


def write_samples(
    run_directory: Path, step: int, samples: Sequence[Sample], episodes: Mapping[int, Episode], chat: Chat, count: int
) -> Path:
    """Write `count` episodes of a step: of each group that teaches something the best and the worst, then others.

    Returns the path of the file.

    `episodes` are those of the samples by their `rollout_id`. Failure where the file cannot be written.
    """
    of_rollout: dict[int, list[Sample]] = {}
    for sample in samples:
        of_rollout.setdefault(sample.rollout_id, []).append(sample)
    of_group: dict[int, list[int]] = {}
    for number in sorted(of_rollout, key=lambda number: (-episodes[number].score.reward, number)):
        of_group.setdefault(of_rollout[number][0].group_id, []).append(number)
    place: dict[int, tuple[bool, bool, int]] = {}
    for group, numbers in of_group.items():
        teaches = any(sample.advantage.any() for number in numbers for sample in of_rollout[number])
        place |= {number: (not teaches, number not in (numbers[0], numbers[-1]), group) for number in numbers}
    chosen = sorted(place, key=lambda number: (*place[number], -episodes[number].score.reward, number))[:count]
    lines = (
        {
            "task": episodes[number].task.name,
            "group": of_rollout[number][0].group_id,
            "reward": episodes[number].score.reward,
            "correct": episodes[number].score.correct,
            "samples": [_as_json(sample, chat) for sample in of_rollout[number]],
        }
        for number in chosen
    )
    path = run_directory / "samples" / f"step_{step}.jsonl"
    write_lines(path, lines)
    return path


def _as_json(sample: Sample, chat: Chat) -> dict[str, Any]:
    mask = sample.loss_mask.tolist()
    logprobs = sample.logprobs.astype(float).round(_DIGITS).tolist()
    return {
        "finish_reason": sample.finish_reason,
        "weight_version": sample.weight_version,
        "temperature": sample.temperature,
        "tokens": chat.token_texts(sample.token_ids.tolist()),
        "mask": list(map(int, mask)),
        "logprobs": [value if counts else None for value, counts in zip(logprobs, mask, strict=True)],
        "advantages": sample.advantage.astype(float).round(_DIGITS).tolist(),
    }


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line beside, and rename it. Failure where that cannot be done."""
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        # Half a surrogate pair is a model's right, and no UTF-8.
        beside.write_text(text, encoding="utf-8", errors="replace")
        os.replace(beside, path)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}") from None
