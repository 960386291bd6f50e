"""Slurm's commands where a site has set them up otherwise."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from parts import REPOSITORY, need_slurm

from slurmkit.slurm.command import CommandClient


def test_without_accounting_a_job_that_the_controller_forgot_is_unknown_and_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_slurm()
    name = f"plain{os.getpid()}"
    devcluster = REPOSITORY / "scripts" / "devcluster"
    subprocess.run([devcluster, "up", "--name", name, "--nodes", "1", "--no-accounting"], check=True, timeout=120)
    try:
        monkeypatch.setenv("SLURM_CONF", str(Path(f"/run/slurmkit-{name}/etc/slurm.conf")))
        assert CommandClient().job("4711") is None
    finally:
        subprocess.run([devcluster, "down", "--name", name], check=True, timeout=120)
