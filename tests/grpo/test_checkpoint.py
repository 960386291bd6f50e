"""Checkpoints are complete or not there, verified, and as many as asked for."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from slurmkit.config.schema import Checkpointing
from slurmkit.errors import Failure
from slurmkit.grpo.checkpoint import Checkpoints, TrainerState


async def write_model(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"weights " * 100)
    (folder / "optimizer.pt").write_bytes(b"moments")


def save(folder: Path, *accuracies: float | None, write: Any = write_model, **config: Any) -> Checkpoints:
    """Save one checkpoint per accuracy, as steps 1, 2, 3 …; None saves one without the metric."""
    checkpoints = Checkpoints(folder, Checkpointing(**config))
    for step, accuracy in enumerate(accuracies, start=1):
        metrics = {} if accuracy is None else {"val:accuracy": accuracy}
        asyncio.run(checkpoints.save(TrainerState(step, 10 * step, step, 0, "digest", metrics), write))
    return checkpoints


def kept(folder: Path) -> list[int]:
    assert not list(folder.glob(".*"))
    return sorted(int(path.name[5:]) for path in folder.iterdir() if path.name not in ("latest", "best"))


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
@pytest.mark.parametrize("damage", ["lost", "cut short", "empty"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = save(tmp_path, 0.1, 0.2)
    path = tmp_path / "step_2" / name
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == "cut short" else b"")
    said: list[str] = []
    found = checkpoints.newest_good(said.append)
    assert found is not None
    assert found[0] == tmp_path / "step_1"
    assert name in said[0]


def test_a_file_that_somebody_added_does_no_harm(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 0.1)
    (tmp_path / "step_1" / "notes.txt").write_text("the good one")
    assert checkpoints.newest_good(pytest.fail) is not None


def test_a_failed_or_killed_save_leaves_no_checkpoint_and_is_cleaned_up(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 0.1)
    state = TrainerState(2, 20, 2, 0, "digest", {"val:accuracy": 0.9})

    async def fail(folder: Path) -> None:
        await write_model(folder)
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    with pytest.raises(
        Failure, match=r"step_2 cannot be saved, with [\d,.]+ MiB left on its disk: .*No space left.*step_1"
    ):
        asyncio.run(checkpoints.save(state, fail))
    assert kept(tmp_path) == [1]
    for left in (".step_7.unfinished", ".step_1.removed"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "trainer.json").write_text("{")
    found = checkpoints.newest_good(pytest.fail)
    assert found is not None
    assert found[0].name == "step_1"
    asyncio.run(checkpoints.save(state, write_model))
    assert kept(tmp_path) == [1, 2]


def test_everything_is_on_the_disk_before_a_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}").partition(".unfinished")[2])
        real(descriptor)

    def replace(source: Path, target: Path) -> None:
        if target.name == "step_1":
            assert synced == expected
        Path(source).rename(target)

    expected = {
        "",
        "/model",
        *(f"/{name}" for name in ("manifest.json", "trainer.json", "optimizer.pt", "model/model.safetensors")),
    }

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, 0.1)
    assert kept(tmp_path) == [1]


@pytest.mark.parametrize(
    ("accuracies", "config", "expected"),
    [
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 2}, [2, 3, 4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 1}, [2, 4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 1, "higher_is_better": False}, [4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": None}, [1, 2, 3, 4]),
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 2, "metric_name": None}, [3, 4]),
        ((0.5, 0.5, 0.5), {"keep_top_k": 1}, [3]),
        ((0.5, None, 0.9, None), {"keep_top_k": 1, "higher_is_better": False}, [1, 4]),
        ((0.5, None, 0.9, None), {"keep_top_k": 1}, [3, 4]),
        ((0.5, math.nan, 0.9, None), {"keep_top_k": 1, "higher_is_better": False}, [1, 4]),
        ((0.5, math.nan, 0.4, math.nan), {"keep_top_k": 1}, [1, 4]),
        ((None, None, None), {"keep_top_k": 2, "higher_is_better": False}, [2, 3]),
    ],
)
def test_the_best_and_the_latest_are_kept(
    tmp_path: Path, accuracies: tuple[float | None, ...], config: dict[str, Any], expected: list[int]
) -> None:
    save(tmp_path, *accuracies, **config)
    assert kept(tmp_path) == expected


@pytest.mark.parametrize(
    ("accuracies", "config", "best"),
    [
        ((0.5, 0.9, 0.8, 0.1), {"keep_top_k": 1}, "step_2"),
        ((0.5, 0.9, 0.9, 0.1), {"keep_top_k": None}, "step_3"),
        ((0.5, 0.9, 0.8, 0.1), {"higher_is_better": False}, "step_4"),
        ((0.5, 0.9), {"metric_name": None}, None),
        ((0.5, 0.9), {"metric_name": "val:reward_mean"}, None),
        ((0.9, 0.5, None), {"higher_is_better": False}, "step_2"),
        ((0.9, 0.5, math.nan), {"higher_is_better": False}, "step_2"),
        ((0.9, 0.5, math.nan), {}, "step_1"),
        ((None, math.nan), {"higher_is_better": False}, None),
    ],
)
def test_links_name_the_best_and_the_latest(
    tmp_path: Path, accuracies: tuple[float | None, ...], config: dict[str, Any], best: str | None
) -> None:
    checkpoints = save(tmp_path, *accuracies, **config)
    assert os.readlink(tmp_path / "latest") == f"step_{len(accuracies)}"
    assert (os.readlink(tmp_path / "best") if (tmp_path / "best").is_symlink() else None) == best
    assert all(not path.is_symlink() for path in checkpoints.all())


def test_a_link_never_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree
    removed = []

    def rmtree(path: Path, **options: Any) -> None:
        removed.append(path)
        assert all((tmp_path / name / "manifest.json").is_file() for name in ("latest", "best"))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(tmp_path, 0.9, 0.1, 0.2, 0.95, 0.3, keep_top_k=1)
    assert len(removed) == 3


def test_links_that_cannot_be_made_cost_nothing_but_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latest").mkdir()
    save(tmp_path, 0.1, 0.2)
    assert (tmp_path / "step_2" / "manifest.json").is_file()
    assert f"links and old checkpoints in {tmp_path} stay as they are" in capsys.readouterr().out


def test_digests_that_the_writer_knows_are_not_computed_again(tmp_path: Path) -> None:
    async def write(folder: Path) -> dict[str, str]:
        await write_model(folder)
        return {"optimizer.pt": "known"}

    save(tmp_path, 0.1, write=write)
    digests = json.loads((tmp_path / "step_1" / "manifest.json").read_text())
    assert digests["optimizer.pt"] == "known"
    assert digests.keys() == {"optimizer.pt", "model/model.safetensors", "trainer.json"}
    assert len(digests["trainer.json"]) == 64
