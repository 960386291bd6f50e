"""No message shows what looks like a secret, and what may be one is warned of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from slurmkit.job.secrets import looks_exposed, without_tokens
from slurmkit.job.settle import Request, settle
from slurmkit.run.preflight import look
from tests.support.requirements import SLURMKIT

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


def slurmkit(here: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"SLURMKIT_SITE": "", "XDG_CONFIG_HOME": str(here), **environment}
    return subprocess.run(
        [SLURMKIT, *arguments], cwd=here, env={**os.environ, **own}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nodes", TOKEN],
        ["--set", f"nodes={TOKEN}"],
        ["--secret", TOKEN],
        ["--set", f"secrets.{TOKEN}=env"],
        ["--name", TOKEN],
        ["--set", f"workdir=/{TOKEN}"],
        ["--results-dir", TOKEN],
        ["--image", "me:password@registry.io#image", "--set", "container.runtime=pyxis"],
        ["--mount", f"/data/{TOKEN}", "--image", "/i", "--set", "container.runtime=pyxis"],
        ["--env", "DB_PASS=password"],
        ["--env", "SESSION_COOKIE=password"],
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_shown(tmp_path: Path, arguments: list[str]) -> None:
    done = slurmkit(tmp_path, "render", *arguments, "--", "true")
    assert done.returncode == 2, done.stdout
    assert not [value for value in (TOKEN, "password@", "=password") if value in done.stderr]


def test_tokens_are_hidden_and_the_rest_of_a_message_is_not() -> None:
    assert without_tokens(f"nodes: not '{TOKEN}' (a.yaml:1)") == "nodes: not '…' (a.yaml:1)"
    assert without_tokens("nodes: not 'two' (a.yaml:1)") == "nodes: not 'two' (a.yaml:1)"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("export api_key=abc", ["api_key"]),
        ("serve --token abc", ["--token"]),
        ("serve --api-key=abc", ["--api-key"]),
        ("wandb login 0123456789abcdef", ["wandb login"]),
        ("curl -s -u me:pw https://x", ["curl -s -u"]),
        ("serve --token $TOKEN", []),
        ('serve --token "$TOKEN"', []),
        ("train --max-tokens 5 --token-limit 3", []),
        ("wandb login", []),
    ],
)
def test_a_command_that_may_hold_a_secret_is_warned_of(tmp_path: Path, line: str, found: list[str]) -> None:
    assert looks_exposed(line.split()) == found
    warned = [
        remark for remark in look(settle(Request(command=tuple(line.split())), tmp_path, {})) if "secret" in remark.text
    ]
    assert len(warned) == len(found)


def test_config_shows_the_values_although_a_required_key_is_missing(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("require: [account]\n")
    done = slurmkit(tmp_path, "config", "--nodes", "3", SLURMKIT_SITE="site.yaml")
    assert (done.returncode, done.stderr) == (2, "error: account must be given: the site requires it (site.yaml:1)\n")
    assert "nodes: 3 " in done.stdout
    assert slurmkit(tmp_path, "render", "--", "true", SLURMKIT_SITE="site.yaml").stdout == ""


@pytest.mark.parametrize(
    ("flags", "is_warned"),
    [
        ({"gres": "gpu:8"}, True),
        ({"gpus_per_node": "h100:8"}, True),
        ({"gres": "gpu:8", "cpus_per_task": 64}, False),
        ({"gres": "gpu:8", "cpus_per_gpu": 8}, False),
        ({"gres": "gpu:8", "exclusive": True}, False),
        ({"gres": "gpu:1"}, False),
        ({}, False),
    ],
)
def test_many_gpus_with_one_cpu_are_warned_of(tmp_path: Path, flags: dict[str, object], is_warned: bool) -> None:
    said = [remark.text for remark in look(settle(Request(command=("true",), flags=flags), tmp_path, {}))]
    assert any("GPUs and 1 CPU on each node" in text for text in said) == is_warned
