"""Checkpoints are complete or not there, verified, and as many as asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.schema import Checkpointing
from slurmkit.grpo.checkpoint import Checkpoints, TrainerState


async def write_model(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"weights " * 100)
    (folder / "optimizer.pt").write_bytes(b"moments")


def save(folder: Path, *accuracies: float, write: Any = write_model, **config: Any) -> Checkpoints:
    """Save one checkpoint per accuracy, as steps 1, 2, 3 …"""
    checkpoints = Checkpoints(folder, Checkpointing(**config))
    for step, accuracy in enumerate(accuracies, start=1):
        state = TrainerState(step, 10 * step, step, 0, "digest", {"val:accuracy": accuracy})
        asyncio.run(checkpoints.save(state, write))
    return checkpoints


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir())


def test_the_newest_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    found = save(tmp_path, 0.1, 0.2).newest_good(pytest.fail)
    assert found == (tmp_path / "step_2", TrainerState(2, 20, 2, 0, "digest", {"val:accuracy": 0.2}))


def test_a_run_directory_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, Checkpointing()).newest_good(pytest.fail) is None


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 0.1, 0.2)
    weights = tmp_path / "step_2" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    said: list[str] = []
    found = checkpoints.newest_good(said.append)
    assert found is not None
    assert found[0] == tmp_path / "step_1"
    assert len(said) == 1
    assert "step_2 is damaged and passed over: model/model.safetensors is not what was written" in said[0]


@pytest.mark.parametrize("name", ["manifest.json", "trainer.json", "optimizer.pt"])
def test_a_lost_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str) -> None:
    checkpoints = save(tmp_path, 0.1, 0.2)
    (tmp_path / "step_2" / name).unlink()
    said: list[str] = []
    found = checkpoints.newest_good(said.append)
    assert found is not None
    assert found[0] == tmp_path / "step_1"
    assert name in said[0]


def test_what_a_crash_left_half_written_is_no_checkpoint_and_the_next_save_clears_it(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 0.1)

    async def crash(folder: Path) -> None:
        await write_model(folder)
        raise OSError("disk full")

    state = TrainerState(2, 20, 2, 0, "digest", {"val:accuracy": 0.9})
    with pytest.raises(OSError, match="disk full"):
        asyncio.run(checkpoints.save(state, crash))
    found = checkpoints.newest_good(pytest.fail)
    assert found is not None
    assert found[0].name == "step_1"
    asyncio.run(checkpoints.save(state, write_model))
    assert kept(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("accuracies", "config", "expected"),
    [
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 2}, [2, 3, 4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 1}, [2, 4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 1, "higher_is_better": False}, [4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": None}, [1, 2, 3, 4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 2, "metric_name": None}, [3, 4]),
        ((0.5, 0.5, 0.5), {"keep_top_k": 1}, [3]),
    ],
)
def test_the_best_and_the_latest_are_kept(
    tmp_path: Path, accuracies: tuple[float, ...], config: dict[str, Any], expected: list[int]
) -> None:
    save(tmp_path, *accuracies, **config)
    assert kept(tmp_path) == expected
