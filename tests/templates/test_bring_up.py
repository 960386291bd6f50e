"""Functions of the rendered bring-up, run by bash with the parts around them replaced."""

from __future__ import annotations

import subprocess
from pathlib import Path

from slurmkit.job.render import render
from slurmkit.job.spec import JobSpec

SPEC = {"name": "t", "python": "/usr/bin/python3", "workdir": "/w", "run_dir": "/r", "command": ["true"]}
# As sk_node_main sets them.
NODE = """set -euo pipefail
sk_raylet='' sk_gcs='' sk_node_ip=10.0.0.2 sk_gpus=0 sk_cpus=1
trap 'echo "a line failed"' EXIT
sk_publish() { :; }
"""


def run(meet: Path, functions: str, call: str) -> str:
    text = render(JobSpec.model_validate(SPEC))
    bring_up = text[text.index("# ---- Ray on every node") : text.index("# ---- one job step")]
    environ = {"SK_MEET": str(meet), "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURMD_NODENAME": "node2"}
    done = subprocess.run(
        ["bash", "-c", f"{bring_up}\n{NODE}{functions}\n{call}\ntrap - EXIT; echo left"],
        env={"PATH": "/usr/bin:/bin", **environ}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return done.stdout


def test_a_signal_that_ends_a_sleep_does_not_fail_a_healthy_node(tmp_path: Path) -> None:
    facts = 'case $((++count)) in 2) echo x >"$SK_MEET/head" ;; 4) echo 0 >"$SK_MEET/exit_code" ;; esac'
    stubs = f"count=0; sleep() {{ {facts}; return 143; }}; sk_start_ray() {{ :; }}"
    assert run(tmp_path, stubs, "sk_run_worker") == "left\n"


def test_a_signal_that_cannot_be_passed_on_does_not_fail_the_node(tmp_path: Path) -> None:
    (tmp_path / "command").write_text("sk_command=(true)\n")
    stubs = "sk_start_ray() { SK_MEET=/nowhere; kill -USR2 $$; trap - EXIT; echo left; exit; }"
    assert run(tmp_path, stubs, "sk_run_head") == "left\n"


def test_two_shells_of_a_node_can_publish_the_same_fact_at_once(tmp_path: Path) -> None:
    text = render(JobSpec.model_validate(SPEC))
    functions = text[text.index("sk_reserve()") : text.index('mkdir -p "$SK_MEET"')]
    call = "sk_reserve fact; for try in {1..300}; do sk_publish fact ended 0 || echo failed; done"
    environ = {"PATH": "/usr/bin:/bin", "SK_MEET": str(tmp_path), "SLURMD_NODENAME": "node1"}
    command = ["bash", "-c", f"set -euo pipefail\n{functions}\n{call}"]
    shells = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [shell.communicate(timeout=60)[0] for shell in shells] == ["", "", ""]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"fact": "ended\n"}
