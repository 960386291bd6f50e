"""What makes the commands fast, as far as it can be told without a clock; benchmarks/launcher.py has one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurmkit.config.load import load_config
from slurmkit.errors import UserError
from slurmkit.job.render import digest_of_templates, environment_for, render
from slurmkit.job.settle import Request, settle
from tests.support.cluster import Cluster

# What no command of the login node loads, and what only some need.
HEAVY = {"pydantic", "torch", "ray", "vllm", "transformers", "wandb", "pyslurm", "numpy", "matplotlib"}
FOR_SOME = {"hydra", "omegaconf", "rich", "yaml"}
# Requests that nodes make on their own, whoever submitted, and sdiag's: see benchmarks/launcher.py.
OF_NODES = {"MESSAGE_EPILOG_COMPLETE", "MESSAGE_NODE_REGISTRATION_STATUS", "REQUEST_PING", "REQUEST_STATS_INFO"}
OF_NODES |= {"REQUEST_STEP_COMPLETE"}


def modules_of(here: Path, *arguments: str, environment: dict[str, str] | None = None) -> set[str]:
    """The modules that a command has loaded when it ends."""
    code = (
        "import sys\nfrom slurmkit.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print(*sys.modules, file=open('modules', 'w'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=here, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set((here / "modules").read_text().split())


@pytest.mark.parametrize(
    ("arguments", "at_most"),
    [("--help", 130), ("render -- true", 220), ("render --help", 220)],
)
def test_a_command_loads_what_it_needs_and_no_more(here: Path, arguments: str, at_most: int) -> None:
    loaded = modules_of(here, *arguments.split())
    assert not loaded & (HEAVY | FOR_SOME)
    ours = {name for name in loaded if name.startswith("slurmkit")}
    assert len(loaded) <= at_most, f"{len(loaded)} modules, {len(ours)} of them ours"


def test_help_loads_none_of_the_commands_that_it_lists(here: Path) -> None:
    ours = {name for name in modules_of(here, "--help") if name.startswith("slurmkit.")}
    assert ours == {"slurmkit.cli", "slurmkit.cli.main", "slurmkit.errors"}


def test_a_process_does_not_look_for_garbage_as_it_ends() -> None:
    # Handlers run last first: this one after slurmkit's.
    code = "import atexit, gc\natexit.register(lambda: print(gc.get_freeze_count()))\nimport slurmkit.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) > 1000


def test_a_dry_run_loads_no_more_than_a_render_and_what_asks_slurm(cluster: Cluster, here: Path) -> None:
    # Without what the tests set besides: a key in the environment is read as YAML.
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("SLURMKIT_")}
    loaded = modules_of(here, "submit", "--dry-run", "--", "true", environment=environment)
    assert not loaded & (HEAVY | FOR_SOME)
    assert len(loaded) <= 250


def test_a_configuration_without_interpolations_needs_no_resolver(here: Path) -> None:
    (here / "train.yaml").write_text("env: {name: arithmetic}\npolicy: {from_scratch: {}}\n")
    loaded = modules_of(here, "render", "--config", "train.yaml")
    assert not loaded & (HEAVY | FOR_SOME - {"yaml"})


def test_sweep_jobs_share_file_reads_and_keep_their_own_values(here: Path) -> None:
    site = here / "site.yaml"
    site.write_text("add: {env: {LINE: one}}\n")
    (here / "slurmkit.yaml").write_text("nodes: 2\nenv: {A: b}\n")
    environment = {"SLURMKIT_SITE": str(site), "HOME": str(here)}

    def script(name: str, **flags: str) -> str:
        request = Request(command=("true",), flags={"name": name, **{f"env.{key}": flags[key] for key in flags}})
        settled = settle(request, here, environment)
        return render(settled.spec, settled.templates)

    first = script("first", SEED="1")
    assert "SEED" not in script("second")
    assert script("first", SEED="1") == first
    # A file that has changed is read again, also within one process and within a clock's tick.
    site.write_text("add: {env: {LINE: two}}\n")
    (here / "slurmkit.yaml").write_text("nodes: 3\nenv: {A: c}\n")
    third = script("first", SEED="1")
    assert "export LINE=two" in third
    assert "export A=c" in third
    assert "#SBATCH --nodes=3" in third


@pytest.mark.parametrize("damage", ["none", "cut short", "nonsense", "of another's", "a file in place of the folder"])
def test_templates_compile_once_and_a_damaged_cache_changes_nothing(here: Path, damage: str) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(here / "cache")}
    code = "from slurmkit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "render", "--", "true"]

    def rendered() -> str:
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    script = rendered()
    folder = here / "cache/slurmkit/templates"
    compiled = sorted(folder.iterdir())
    assert len(compiled) >= 3
    assert folder.stat().st_mode & 0o777 == 0o700
    for path in compiled:
        whole = path.read_bytes()
        if damage == "cut short":
            path.write_bytes(whole[:30])
        elif damage == "nonsense":
            path.write_bytes(whole[:14] + os.urandom(200))
        elif damage == "of another's":
            # With other code inside, which must not run.
            path.write_bytes(whole.replace(b"set -euo pipefail", b"set +euo pipefail"))
            os.chown(path, 65534, 65534)
    if damage == "a file in place of the folder":
        for path in compiled:
            path.unlink()
        folder.rmdir()
        folder.write_text("")
    before = {path: path.stat().st_mtime_ns for path in compiled if path.exists()}
    assert rendered() == script
    if damage == "none":
        assert before == {path: path.stat().st_mtime_ns for path in compiled}


def test_a_changed_template_is_compiled_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    templates = here / "templates"
    templates.mkdir()
    settled = settle(Request(command=("true",), flags={"templates": str(templates)}), here, {"HOME": str(here)})
    for text in ("one", "two"):
        (templates / "included.j2").write_text(text)
        (templates / "job.sbatch.j2").write_text("{% include 'included.j2' %}")
        environment_for.cache_clear()
        assert render(settled.spec, settled.templates) == text


def test_compiled_template_is_checked_again_after_its_parent_changes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    templates = here / "templates"
    templates.mkdir()
    (templates / "job.sbatch.j2").write_text("{% extends 'base.j2' %}{% block one %}1{% endblock %}")
    (templates / "base.j2").write_text("{% block one %}{% endblock %}")
    settled = settle(Request(command=("true",), flags={"templates": str(templates)}), here, {"HOME": str(here)})
    assert render(settled.spec, settled.templates) == "1"
    (templates / "base.j2").write_text("{% block two %}{% endblock %}")
    environment_for.cache_clear()
    digest_of_templates.cache_clear()
    with pytest.raises(UserError, match="the block 'one' overrides nothing"):
        render(settled.spec, settled.templates)


def test_a_configuration_reads_the_same_the_second_time(here: Path) -> None:
    (here / "base.yaml").write_text("env: {name: arithmetic}\npolicy: {from_scratch: {}}\n")
    (here / "child.yaml").write_text("defaults: base.yaml\ngrpo: {seed: 7}\n")
    assert load_config(here / "child.yaml") == load_config(here / "child.yaml")


def test_a_job_asks_the_controller_as_often_on_one_node_as_on_four(cluster: Cluster, shared_path: Path) -> None:
    """From its submission until it has ended. What nodes tell of themselves is not the job's."""
    counts = {}
    for nodes in (1, 4):
        cluster.ask("sdiag", "--reset")
        options = ["--set", "ray.num_cpus=1", "--set", "ray.object_store_memory=100000000", "--name", f"on-{nodes}"]
        done = cluster.slurmkit(shared_path, "submit", f"--nodes={nodes}", *options, "--", "true")
        assert done.returncode == 0, done.stderr
        job_id = done.stdout.split()[1]
        # Accounting has a daemon of its own.
        assert cluster.ended(job_id) == "COMPLETED|0:0"
        by_kind = cluster.ask("sdiag").partition("by message type")[2].partition("by user")[0]
        found = {kind: int(count) for kind, count in re.findall(r"(\w+)\s+\(\s*\d+\) count:(\d+)", by_kind)}
        counts[nodes] = {kind: count for kind, count in found.items() if kind not in OF_NODES}
    assert counts[1] == counts[4]
    assert counts[1]["REQUEST_SUBMIT_BATCH_JOB"] == counts[1]["REQUEST_JOB_STEP_CREATE"] == 1
