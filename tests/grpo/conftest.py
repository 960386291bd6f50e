"""One finished run for all tests that only look at what a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import Run, run

TINY = Path(__file__).with_name("tiny.yaml")
# Every step is saved and stays, so that any step of another run with the same numbers can be compared with it.
EVERY_STEP = ("checkpointing.keep_top_k=null", "checkpointing.metric_name=train:reward_mean")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight steps, each saved, with everything logged that can be."""
    overrides = (*EVERY_STEP, "checkpointing.save_period=1", "logger.tensorboard_enabled=true")
    done = run(
        tmp_path_factory.mktemp("finished") / "run", TINY, *overrides, "cluster.peak_tflops_per_gpu=0.1", timeout=550
    )
    assert done.code == 0, done.errors
    return done
