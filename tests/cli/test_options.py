"""Flags with Slurm's names, and what a shell completes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.requirements import SLURMKIT

FLAGS = {
    "reservation": ("--reservation maintenance", "maintenance"),
    "nodelist": ("-w node[1-2]", "node[1-2]"),
    "exclude": ("-x node3", "node3"),
    "dependency": ("-d afterok:7", "afterok:7"),
    "sbatch.licenses": ("-L matlab:2", "matlab:2"),
    "mail_type": ("--mail-type END,FAIL", "END,FAIL"),
    "mail_user": ("--mail-user me@example.org", "me@example.org"),
    "container.image": ("--image ./a.sqsh", "{here}/a.sqsh"),
    "container.mounts": ("--mount /data --mount ./b:/c:ro", ["/data:/data", "{here}/b:/c:ro"]),
    "secrets.A.env": ("--secret A", "A"),
    "secrets.B.env": ("--secret B=env:C", "C"),
    "secrets.D.file": ("--secret D=file:~/.key", "~/.key"),
    "secrets.E.command": ("--secret E=command:pass_show", "pass_show"),
}


def slurmkit(here: Path, *arguments: str, **environment: str) -> str:
    own = {"SLURMKIT_SITE": "", "XDG_CONFIG_HOME": str(here), **environment}
    done = subprocess.run(
        [SLURMKIT, *arguments], cwd=here, env={**os.environ, **own}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], dict[str, str]]:
    here = tmp_path_factory.mktemp("flags")
    flags = " ".join(flag for flag, _ in FLAGS.values()).split()
    words = ["config", "--json", "--set", "container.runtime=pyxis", *flags, "--", "true"]
    found = json.loads(slurmkit(here, *words))
    return here, found["spec"], found["origins"]


@pytest.mark.parametrize("key", FLAGS)
def test_a_flag_with_slurm_s_name_sets_its_key(
    settled: tuple[Path, dict[str, object], dict[str, str]], key: str
) -> None:
    here, spec, origins = settled
    expected = json.loads(json.dumps(FLAGS[key][1]).replace("{here}", str(here)))
    value: object = spec
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    assert value == expected
    assert origins[key].startswith("command line: ")


def completed(here: Path, line: str, **environment: str) -> list[str]:
    words = line.split(" ")
    ask = {"_SLURMKIT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return [answer.partition(",")[2] for answer in slurmkit(here, **ask, **environment).split()]


def test_a_shell_completes_keys_profiles_partitions_and_accounts(tmp_path: Path) -> None:
    (tmp_path / "slurmkit.yaml").write_text("profiles: {debug: {nodes: 1}, large: {nodes: 9}}\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sinfo").write_text("#!/bin/sh\nprintf 'batch\\nhigh\\nbatch\\n'\n")
    (programs / "sinfo").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    assert completed(tmp_path, "slurmkit submit --set container.wr") == ["container.writable="]
    assert completed(tmp_path, "slurmkit submit --profile d") == ["debug"]
    assert completed(tmp_path, "slurmkit submit --partition ", PATH=path) == ["batch", "high"]
    (programs / "sacctmgr").write_text("#!/bin/sh\nprintf 'proj-1\nproj-2\nteam\n'\n")
    (programs / "sacctmgr").chmod(0o755)
    assert completed(tmp_path, "slurmkit submit --account pr", PATH=path) == ["proj-1", "proj-2"]
    (programs / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    assert completed(tmp_path, "slurmkit submit -p h", PATH=path) == []
