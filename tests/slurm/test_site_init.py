"""A site's file drafted from a real cluster, and the jobs that it refuses there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.support.cluster import Cluster


def test_drafted_site_file_passes_lint_and_keeps_the_cluster_limits(cluster: Cluster, shared_path: Path) -> None:
    site = shared_path / "site.yaml"
    drafted = cluster.slurmkit(shared_path, "site", "init", "--out", site)
    assert drafted.returncode == 0, drafted.stderr
    assert cluster.slurmkit(shared_path, "site", "lint", site).returncode == 0
    text = site.read_text()
    for fact in ("partition: batch  # the cluster's own default", "gpu:h100:8", "pyxis is not installed"):
        assert fact in text
    submit = ["submit", "--dry-run", "--partition", "high"]
    accepted = cluster.slurmkit(shared_path, *submit, "--nodes", "4", "--", "true", SLURMKIT_SITE=str(site))
    assert accepted.returncode == 0, accepted.stderr
    refused = cluster.slurmkit(
        shared_path, *submit, "--nodes", "5", "--time", "1-0", "--", "true", SLURMKIT_SITE=str(site)
    )
    line = next(number for number, row in enumerate(text.splitlines(), 1) if row.startswith("  high:"))
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "limits: {nodes" in row and number > line)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: nodes: 5 (command line: nodes) is above the maximum of 4 for partition high, by the site's rule "
        f"({site}:{line})\n"
        f"time: '1-0' (command line: time) is above the maximum of 0-04:00:00 for partition high, by the site's rule "
        f"({site}:{line})\n"
    )


@pytest.mark.parametrize("name", ["site.yaml", "/dev/null", ""])
def test_a_submitted_job_s_record_names_the_site_s_file_and_its_digest(
    cluster: Cluster, shared_path: Path, name: str
) -> None:
    (shared_path / "site.yaml").write_text("limits: {nodes: {max: 4}}\n")
    submit = ("submit", "--name", "x", "--set", "sbatch.hold=true", "--", "true")
    done = cluster.slurmkit(shared_path, *submit, SLURMKIT_SITE=name)
    assert done.returncode == 0, done.stderr
    [attempt] = json.loads((shared_path / "results/x/run.json").read_text())["attempts"]
    cluster.ask("scancel", attempt["job_id"])
    digest = hashlib.sha256((shared_path / name).read_bytes() if name else b"").hexdigest()
    assert attempt["site"] == ({"file": str(shared_path / name), "sha256": digest} if name else None)
