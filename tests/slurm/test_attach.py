"""`slurmkit attach` on a real Slurm of two nodes: where the shell is, what it sees, how it ends, and who may."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.containers import Machines, is_over, wait_for, wait_until
from tests.support.requirements import SLURMKIT

ODD = 'it\'s $HOME\n`id` "é" \\ end'
SECRET = "s3cret-of-the-job"
# The job's command: says what it sees, and stays. Ray knows its own status some seconds after it has started.
STAY = """
env -0 >environment
until ray status | grep -q Active; do sleep 0.5; done
touch up
until [ -e stop ]; do sleep 0.2; done
"""
# Different for every process, as are slurmkit's own, which an attached shell does not get.
OWN = {"_", "SHLVL", "TERM", "OLDPWD"}


@pytest.fixture
def place(machines: Machines) -> Iterator[Path]:
    """A folder that both nodes see, and no job afterwards."""
    with tempfile.TemporaryDirectory(prefix="slurmkit-attach-", dir="/var/tmp") as folder:
        yield Path(folder)
        machines.cluster.ask("scancel", "--user", "root")
        wait_until(lambda: is_over(machines), "the job ends", 90)


def in_terminal(machines: Machines, place: Path, line: str, *options: str) -> tuple[int, str]:
    """Type a line into an attached shell; its exit code, and what the terminal showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execve(SLURMKIT, [SLURMKIT, "attach", *options, "t"], {**machines.cluster.environment, "TERM": "vt100"})
    shown = b""
    with suppress(OSError):  # the terminal's end
        while not shown.endswith((b"# ", b"$ ")):
            shown += os.read(terminal, 1 << 16)
        os.write(terminal, f"{line}\n".encode())
        while block := os.read(terminal, 1 << 16):
            shown += block
    os.close(terminal)
    plain = re.sub(r"\x1b\[[?0-9;]*[a-z]|\r", "", shown.decode())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), plain


def variables(text: str) -> dict[str, str]:
    return {
        name: value
        for name, _, value in (each.partition("=") for each in text.split("\0")[:-1])
        if name not in OWN and not name.startswith("SK_")
    }


@pytest.mark.parametrize("runtime", ["none", "podman", "pyxis"])
def test_attach_shell_shares_the_commands_env_and_ray_and_keeps_its_code(
    machines: Machines, place: Path, runtime: str
) -> None:
    nodes = ["node1", "node2"] if runtime == "podman" else ["node1"]  # a second node takes seconds
    job: dict[str, Any] = {
        "nodes": len(nodes),
        "nodelist": ",".join(nodes),
        "env": {"ODD": ODD},
        "setup": ["export FROM_SETUP=here"],
        "secrets": ["MY_TOKEN"],
        "ray": {"num_cpus": 1, "object_store_memory": 80_000_000},
    }
    if runtime != "none":
        job["container"] = machines.container(runtime)
    done = machines.submit(place, job, "job.yaml", "--", "bash", "-c", STAY, MY_TOKEN=SECRET)
    wait_for(machines, place / "up", done)

    def attached(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return machines.cluster.slurmkit(place, "attach", *words, timeout=60, **environ)

    # On a terminal.
    code, shown = in_terminal(machines, place, "echo $RAY_ADDRESS; ray status | head -3; echo $TERM; exit 7")
    address = (place / "results/t/attempts/latest/bringup/head").read_text().strip()
    assert code == 7, shown
    assert re.search(rf"^{address}\n=+ Autoscaler status: .*\nNode status\n-+\nvt100\n", shown, re.MULTILINE), shown
    # In a script, where the input is not a terminal: what the command sees, and nothing of who asks.
    seen = attached("t", "--", "env", "-0", ODD_CALLER="x", PATH=f"/caller:{os.environ['PATH']}")
    assert variables(seen.stdout) == variables((place / "environment").read_text())
    assert variables(seen.stdout)["MY_TOKEN"] == SECRET
    inside = "inside\n" if runtime != "none" else ""
    facts = '"$SLURMD_NODENAME" "$FROM_SETUP" "$RAY_ADDRESS" "${SLURM_STEP_ID-none}" "$ODD"'
    script = f'cat /in-the-image; pwd; printf "%s|" {facts} "$@"; exit 5'
    # On other nodes it is what Ray's workers see there, without Slurm's own.
    for node, step in zip(nodes, ("0", "none"), strict=False):
        done = attached("t", "--node", node, "--", "bash", "-c", script, "zero", "a  b", ":", "--", "$HOME")
        assert done.returncode == 5, done.stderr
        assert done.stdout == f"{inside}{place}\n{node}|here|{address}|{step}|{ODD}|a  b|:|--|$HOME|"
    # Ray also where no command runs, and no secret in any process's arguments meanwhile.
    with subprocess.Popen(
        [SLURMKIT, "attach", "t", "--node", nodes[-1], "--", "bash", "-c", "ray status; touch in; read -r"],
        cwd=place,
        env=machines.cluster.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: (place / "in").exists(), "it is attached", 90)
        arguments = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not any(SECRET.encode() in words for words in arguments), "nodes' processes are this machine's, too"
        out, _ = process.communicate("\n", timeout=60)
    assert (process.returncode, out.count(" 1 node_")) == (0, len(nodes))
    done = attached("t", "--node", "node3")
    assert done.returncode == 2
    assert f"which has {', '.join(nodes)}" in done.stderr
    # It ends with the job.
    with subprocess.Popen(
        [SLURMKIT, "attach", "t", "--", "sleep", "300"], cwd=place, env=machines.cluster.environment
    ) as process:
        time.sleep(1)
        (place / "stop").touch()
        assert process.wait(60) != 0
    wait_until(lambda: is_over(machines), "the job ends", 90)
    assert machines.left() == []
    done = attached("t")
    assert done.returncode == 2
    assert "t does not run: it is done" in done.stderr


def test_a_run_that_waits_or_is_another_user_s_is_refused_and_said(machines: Machines, place: Path) -> None:
    done = machines.cluster.slurmkit(place, "submit", "--name", "t", "--set", "sbatch.hold=true", "--", "true")
    assert done.returncode == 0, done.stderr
    done = machines.cluster.slurmkit(place, "attach", "t")
    assert done.returncode == 2
    assert "t does not run: it is queued (held by its user" in done.stderr
    job_id = machines.cluster.ask(
        "sbatch", "--parsable", "--uid=nobody", "--output=/dev/null", "--job-name=other", "--wrap=sleep 100"
    ).strip()
    try:
        folder = place / "results/other/attempts" / f"{job_id}.0"
        folder.mkdir(parents=True)
        (folder / "start.json").write_text(json.dumps({"job_id": job_id, "started": time.time(), "nodes": "node1"}))
        (folder / "driver.log").touch()
        wait_until(lambda: machines.cluster.ask("squeue", "-h", "-o", "%T", "-j", job_id) == "RUNNING\n", "it runs", 90)
        done = machines.cluster.slurmkit(place, "attach", "other", "--", "true")
        assert done.returncode == 2
        assert f"job {job_id} of other is another user's" in done.stderr
    finally:
        machines.cluster.ask("scancel", job_id)
