"""Where secrets come from, what is refused, and that no message ever holds a value."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from slurmkit.config.section import Section, ValidationError
from slurmkit.errors import UserError
from slurmkit.job import secrets
from slurmkit.job.secrets import (
    Secrets,
    SecretSource,
    looks_secret,
    no_secret,
    no_secret_name,
    read_secrets,
    refuse_tokens,
)
from tests.support.requirements import SLURMKIT

VALUE = "planted-value-7b1f"
TOKENS = [
    "hf_" + "aB3" * 11,
    "sk-" + "aB3" * 16,
    "sk-proj-" + "aB3-_" * 8,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3_" * 8,
    "AKIA" + "ABCD" * 4,
    "nvapi-" + "aB3-" * 8,
    "wandb_v1_" + "aB3_" * 8,
    "glpat-" + "aB3-" * 5,
    "https://user:pass-word@proxy:3128",
    "-----BEGIN OPENSSH PRIVATE KEY-----",
]


class Holder(Section):
    secrets: Secrets


def of(data: object) -> dict[str, SecretSource]:
    return Holder.model_validate({"secrets": data}).secrets


def read(source: object) -> str:
    return read_secrets(of({"A_TOKEN": source}), lambda name: f"job.yaml:7 {name}")["A_TOKEN"]


def refusal(source: object) -> str:
    with pytest.raises(UserError) as caught:
        read(source)
    assert VALUE not in str(caught.value)
    assert str(caught.value).endswith("(job.yaml:7 A_TOKEN)")
    return str(caught.value)


def private(path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def run(here: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [SLURMKIT, "run", *arguments]
    return subprocess.run(
        command, cwd=here, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def test_a_value_is_read_from_the_environment_a_file_or_a_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", VALUE)
    monkeypatch.setenv("OTHER", "it's $(other)")
    monkeypatch.setenv("HOME", str(here))
    private(here / "my token", VALUE + "\r\n")
    assert read("env") == VALUE
    assert read({"env": "OTHER"}) == "it's $(other)"
    assert read({"file": "~/my token"}) == read({"file": "$HOME/my token"}) == VALUE
    assert read({"command": "cat 'my token'"} | {"command": f"cat '{here}/my token'"}) == VALUE
    assert read({"command": ["printf", "%s", "$HOME; x"]}) == "$HOME; x", "no shell reads it"


def test_secret_names_read_the_environment_and_both_forms_round_trip() -> None:
    data = {"A": "env", "B": {"file": "/x"}, "C": {"command": ["a", "b"]}, "D": {"command": "a b", "env": None}}
    assert of(["A", "B"]) == of({"A": "env", "B": {"env": "B"}})
    plain = Holder(secrets=of(data)).model_dump(mode="json")["secrets"]
    assert plain == {"A": {"env": "A"}, "B": {"file": "/x"}, "C": {"command": ["a", "b"]}, "D": {"command": "a b"}}
    assert of(plain) == of(data)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o644])
def test_a_file_that_others_may_use_is_refused_with_the_way_to_close_it(here: Path, mode: int) -> None:
    path = private(here / "token", VALUE, mode)
    assert f"has mode {mode:04o}, so others may use it: chmod 600 '{path}'" in refusal({"file": path})


def test_a_file_of_somebody_else_s_is_refused(here: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file somebody else's")
    path = private(here / "token", VALUE)
    os.chown(path, 12345, -1)
    assert "belongs to user number 12345" in refusal({"file": path})


def test_what_is_no_file_is_refused_and_never_waited_for(here: Path) -> None:
    os.mkfifo(here / "pipe", 0o600)
    assert "pipe is not a regular file" in refusal({"file": str(here / "pipe")})
    assert "cannot be read: Is a directory" in refusal({"file": str(here)})
    assert "cannot be read: No such file or directory" in refusal({"file": "/no/such"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        (f"{VALUE}\n{VALUE}\n", "it has more than one line"),
        (f"{VALUE}\0", "or a NUL byte"),
        (VALUE.encode() + b"\xff", "it is not UTF-8 text"),
        (VALUE * 10_000, "it is longer than 100000 bytes"),
    ],
)
def test_a_value_that_cannot_be_one_is_refused_without_being_shown(here: Path, text: str | bytes, reason: str) -> None:
    path = private(here / "token", text)
    assert reason in refusal({"file": path})
    assert reason in refusal({"command": ["cat", path]})


def test_a_command_that_fails_or_hangs_is_named_and_what_it_said_is_not(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "tell").write_text(f"#!/bin/sh\necho {VALUE}\nexit 3\n")
    (here / "tell").chmod(0o755)
    assert f"secrets.A_TOKEN: command '{here}/tell': it ended with exit code 3" in refusal(
        {"command": [str(here / "tell")]}
    )
    assert "no-such-program cannot be started: No such file" in refusal({"command": "no-such-program show hf"})
    monkeypatch.setattr(secrets, "_DEADLINE", 0.2)
    # The child that it leaves behind keeps its output open.
    assert "did not end within 0.2 s" in refusal({"command": ["sh", "-c", "sleep 5 & wait"]})


def test_all_that_is_missing_is_named_at_once_and_no_command_asks_then(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONE", raising=False)
    asked = here / "asked"
    sources = of({"ASKS": {"command": ["touch", str(asked)]}, "ONE": "env", "TWO": {"file": "/no/such"}})
    with pytest.raises(UserError) as caught:
        read_secrets(sources, lambda name: f"x:{name}")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["secrets.ONE", "secrets.TWO"]
    assert "the environment of this command has no ONE; export it" in str(caught.value)
    assert not asked.exists()


@pytest.mark.parametrize(
    "data",
    [
        {"A_TOKEN": VALUE},
        {"A_TOKEN": {"file": VALUE}},
        {"A_TOKEN": {"value": VALUE}},
        {"A_TOKEN": {"env": VALUE}},
        {"A_TOKEN": [VALUE]},
        {"A_TOKEN": {"env": [VALUE]}},
        {"A_TOKEN": {"command": []}},
        {"A_TOKEN": {"command": f"echo '{VALUE}"}},
        {"A_TOKEN": {"env": "X", "file": "/x"}},
        {"A_TOKEN": {}},
        {"A_TOKEN": None},
        {TOKENS[0]: "env"},
        [TOKENS[0]],
        {"A_TOKEN": {"env": TOKENS[0]}},
        {"A_TOKEN": {"command": ["echo", TOKENS[0]]}},
        {"not a name": "env"},
        {"SLURM_CONF": "env"},
        {"LD_PRELOAD": "env"},
        VALUE,
        7,
    ],
)
def test_invalid_source_is_refused_and_the_error_omits_the_value(data: object) -> None:
    with pytest.raises(ValidationError) as caught:
        of(data)
    [problem] = caught.value.problems
    assert problem.kind == "value"
    assert VALUE not in problem.message
    assert TOKENS[0] not in problem.message


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "OPENAI_API_KEY",
        "hf_token",
        "MY_APIKEY",
        "SSH_PRIVATE_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "DB_PASSWORD",
        "MYSQL_PWD",
        "CLIENT_SECRET_2",
        "GCP_CREDENTIALS",
        "GH_PAT",
        "HF_TOKEN_2",
        "NGC_API_KEY",
    ],
)
def test_names_that_hold_secrets_are_refused_under_env_with_the_right_form(name: str) -> None:
    assert looks_secret(name)
    with pytest.raises(ValueError, match=f"`{name}: env`, or .*--secret {name}"):
        no_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM",
        "MAX_TOKENS",
        "MAX_NUM_BATCHED_TOKENS",
        "PAD_TOKEN_ID",
        "EOS_TOKEN",
        "HF_TOKEN_PATH",
        "AWS_REGION",
        "AWS_SHARED_CREDENTIALS_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        "CACHE_KEY",
        "KEYBOARD",
        "MONKEY",
        "PUBLIC_KEY",
        "RAY_AUTH_TOKEN_PATH",
        "PATH",
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "AUTHOR",
    ],
)
def test_names_that_only_look_so_are_left_alone(name: str) -> None:
    assert no_secret_name(name) == name


@pytest.mark.parametrize("value", TOKENS)
def test_well_known_tokens_are_refused_wherever_they_stand(value: str) -> None:
    with pytest.raises(ValueError, match=r"^a\.b: holds what looks like ") as caught:
        refuse_tokens({"a": [{"b": f"x={value} y"}]})
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "d6f4b1c2a3958e7708f6d5c4b3a2918070605040",
        "/envs/task-sk-learn-experiments-2024/bin",
        "hf_text_generation_inference_server",
        "http://proxy:3128/x@y",
        "https://user:$PASSWORD@host",
        "export HF_TOKEN=$(cat ~/.hf_token)",
        'HF_TOKEN="${HF_TOKEN:-}"',
        "unset HF_TOKEN; MAX_TOKENS=5 x",
        "HF_TOKEN= python x",
        "policy.max_tokens=512",
        "Qwen/Qwen3-0.6B",
    ],
)
def test_what_is_no_secret_may_stand_anywhere(text: str) -> None:
    assert no_secret(text) == text


def test_an_assignment_in_a_command_or_in_setup_is_refused() -> None:
    for text in (f"WANDB_API_KEY={VALUE} uv run x", f"export HF_TOKEN='{VALUE}'", f"env A_PASSWORD={VALUE} x"):
        with pytest.raises(ValueError, match=r"^gives ") as caught:
            no_secret(text)
        assert VALUE not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", f"HF_TOKEN={VALUE}", "--", "true"], "env.HF_TOKEN: HF_TOKEN looks like a secret"),
        (["--env", f"X={TOKENS[0]}", "--", "true"], "env.X: holds what looks like a Hugging Face token"),
        (["--set", f"secrets.HF_TOKEN={VALUE}", "--", "true"], "secrets.HF_TOKEN: must say where"),
        (["--set", "secrets.B=env", "--env", "B=1", "--", "true"], "env.B and secrets.B both set the variable"),
        (["--set", "secrets.B_XYZ=env", "--", "true"], "has no B_XYZ; export it, or give another source (command"),
        (["--", "bash", "-c", f"WANDB_API_KEY={VALUE} x"], "command.2: gives WANDB_API_KEY a value"),
        (["--", "x", TOKENS[1]], "command.1: holds what looks like an API key"),
        (["--config", "t.yaml", f"logger.wandb.name={TOKENS[0]}"], "logger.wandb.name: holds what looks like"),
        (["--set", "umask=777", "--", "true"], "umask: '777' is not octal and 077 at most"),
    ],
)  # fmt: skip
def test_misplaced_secret_fails_the_command_and_nothing_is_written(
    here: Path, arguments: list[str], message: str
) -> None:
    (here / "t.yaml").write_text("env: {name: arithmetic}\npolicy: {from_scratch: {}}\n")
    done = run(here, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not {text for text in (VALUE, *TOKENS) if text in done.stdout + done.stderr}
    assert [path.name for path in here.iterdir()] == ["t.yaml"]


def test_a_local_run_has_its_secrets_and_keeps_what_it_writes_to_itself(here: Path) -> None:
    path = private(here / "token", VALUE)
    (here / "job.yaml").write_text(f"secrets:\n  A_TOKEN: {{file: '{path}'}}\n  B_TOKEN: env\n")
    script = '[[ $A_TOKEN == "$B_TOKEN" ]] && touch same'
    done = run(here, "job.yaml", "--name", "x", "--", "bash", "-c", script, B_TOKEN=VALUE)
    assert done.returncode == 0, done.stderr
    assert (here / "same").exists()
    written = [here / "results", *(here / "results").rglob("*")]
    assert not [entry for entry in written if entry.is_file() and VALUE in entry.read_text()]
    assert not [entry for entry in written if not entry.is_symlink() and entry.stat().st_mode & 0o077]


def test_a_stronger_layer_s_source_takes_the_place_of_a_weaker_one_s(here: Path) -> None:
    path = private(here / "token", VALUE)
    (here / "slurmkit.yaml").write_text("secrets: [A_TOKEN, B_TOKEN]\n")
    (here / "job.yaml").write_text(f"secrets:\n  A_TOKEN: {{file: '{path}'}}\n")
    arguments = ("job.yaml", "--set", "secrets.C_TOKEN.command=printf c", "--", "bash", "-c", "set >set")
    done = run(here, *arguments, B_TOKEN="b", A_TOKEN="wrong")
    assert done.returncode == 0, done.stderr
    assert {f"A_TOKEN={VALUE}", "B_TOKEN=b", "C_TOKEN=c"} <= set((here / "set").read_text().splitlines())
