"""slurmkit evaluate bfcl: bfcl-eval's own judgement of right and wrong answers, and all of it with vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slurmkit.errors import Failure, UserError
from slurmkit.evaluate import installation, nemo, server
from slurmkit.evaluate.bfcl import Settings, ask, compared, notes, refuse_silence, remarks, rows
from slurmkit.evaluate.installation import bfcl_python
from slurmkit.evaluate.models import Model
from slurmkit.evaluate.server import vllm_server
from tests.support.openai_server import KEY, Call, answers, serving
from tests.support.requirements import SLURMKIT, missing
from tests.support.tiny_model import make_tiny_model

# Where a user's is too.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slurmkit" / "bfcl"
CATEGORIES = ("simple_python", "parallel", "multi_turn_base")


@pytest.fixture(scope="module")
def python() -> Path:
    """bfcl-eval's environment, made as for a user, and once: it takes some 15 seconds."""
    try:
        return bfcl_python(None, CACHE, print)
    except Failure as error:
        missing(str(error))


@pytest.fixture(scope="module")
def data(python: Path) -> Path:
    [folder] = python.parent.parent.glob("lib/python3*/site-packages/bfcl_eval/data")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose template shows tools, as long as BFCL's are in bytes."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    make_tiny_model(folder, max_length=8192, num_attention_heads=1, num_key_value_heads=1)
    template = folder / "chat_template.jinja"
    template.write_text("{% if tools %}<|system|>{{ tools | tojson }}{% endif %}" + template.read_text())
    return folder


def asked(settings: Settings, python: Path, folder: Path, answer: Any) -> tuple[Any, list[dict[str, Any]]]:
    folder.mkdir()
    with serving(answer) as (url, requests):
        return ask(settings, python, folder, url, KEY, lambda: None), requests


@pytest.mark.vllm
def test_right_answers_score_1_and_nonsense_scores_1_only_on_irrelevance(
    python: Path, data: Path, tmp_path: Path
) -> None:
    settings = Settings((*CATEGORIES, "irrelevance"), limit=2, seed=0, max_tokens=77, concurrency=4)
    right = answers(data, *CATEGORIES)

    def knowing(question: str, is_after_a_tool: bool) -> list[Call] | str:
        try:
            return right(question, is_after_a_tool)
        except KeyError:  # of irrelevance: no tool fits
            return "None of these can do that."

    best, requests = asked(settings, python, tmp_path / "best", knowing)
    assert {each["max_completion_tokens"] for each in requests} == {77}
    assert all(each["tools"] for each in requests)
    worst, _ = asked(settings, python, tmp_path / "worst", lambda *_: "%")
    result = compared({"checkpoint": best, "baseline": worst}, settings)
    means = {
        side: {name: each["mean"] for name, each in figures["categories"].items()}
        for side, figures in result["figures"].items()
    }
    assert means["checkpoint"] == dict.fromkeys(settings.categories, 1)
    assert means["baseline"] == {**dict.fromkeys(CATEGORIES, 0), "irrelevance": 1}
    assert means["difference"] == {**dict.fromkeys(CATEGORIES, 1), "irrelevance": 0}
    assert result["entries"]["simple_python"] == {"size": 400, "asked": 2}
    assert [row[0] for row in rows(result)] == ["simple_python", "parallel", "irrelevance", "multi_turn_base"]
    [note] = notes(result)
    assert note.startswith("no overall: simple_java, ")


@pytest.mark.vllm
def test_requests_that_fail_are_told_as_bfcl_eval_takes_them_for_replies(python: Path, tmp_path: Path) -> None:
    first: list[str] = []

    def failing(question: str, _: bool) -> str:
        first.append(question)
        if question != first[0]:
            raise ValueError("no room for the prompt")
        return "No."

    settings = Settings(("irrelevance",), limit=3, concurrency=1)
    found, _ = asked(settings, python, tmp_path / "some", failing)
    [line] = remarks(found)
    assert line.startswith("irrelevance: 2 of 3 requests failed, the first with: Error during inference: ")
    assert "no room for the prompt" in line
    assert compared({"checkpoint": found}, settings)["figures"]["checkpoint"]["failed_requests"] == {"irrelevance": 2}
    failed = {name: entry for name, entry in found["irrelevance"]["entries"].items() if entry["error"]}
    with pytest.raises(Failure, match=r"not one of 2 requests went well; the first: .*no room for the prompt"):
        refuse_silence({"irrelevance": {"size": 240, "entries": failed}})


@pytest.mark.vllm
def test_evaluate_bfcl_serves_and_scores_a_model_and_leaves_no_server(
    python: Path, model: Path, tmp_path: Path
) -> None:
    words = ["--categories", "simple_python,irrelevance", "--limit", "2", "--max-tokens", "8", "--dtype", "float32"]
    done = subprocess.run(
        [SLURMKIT, "evaluate", "bfcl", model, *words, "--bfcl-python", python],
        cwd=tmp_path,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "evaluate" / "bfcl-tiny.json").read_text())
    figures = result["figures"]["checkpoint"]
    # A model of random weights calls nothing.
    assert {name: each["mean"] for name, each in figures["categories"].items()} == {
        "simple_python": 0,
        "irrelevance": 1,
    }
    assert figures["failed_requests"] == {"simple_python": 0, "irrelevance": 0}
    assert result["settings"]["tool_parser"] == "hermes"
    assert "no overall: simple_java" in done.stdout
    log = (tmp_path / "evaluate" / "bfcl-tiny" / "checkpoint" / "server.log").read_text()
    assert "POST /v1/chat/completions" in log
    assert not _serving(model)


@pytest.mark.vllm
def test_a_seeded_request_with_a_long_prompt_is_answered(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    asked = {"model": "tiny", "prompt": "a" * 6000, "max_tokens": 4, "seed": 1}
    with vllm_server(model, "tiny", ["--dtype", "float32"], tmp_path / "server.log", deadline_seconds=300) as served:
        told = {"Authorization": f"Bearer {served.api_key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{served.base_url}/completions", json.dumps(asked).encode(), told)
        with urllib.request.urlopen(request, timeout=120) as reply:
            answered = json.load(reply)
        served.check()
    assert answered["usage"]["prompt_tokens"] >= 6000


def _serving(model: Path) -> list[psutil.Process]:
    words = {"vllm.entrypoints.openai.api_server", str(model)}
    return [each for each in psutil.process_iter(["cmdline"]) if words <= set(each.info["cmdline"] or ())]


@pytest.mark.vllm
def test_a_server_that_exceeds_its_timeout_is_killed_and_its_log_is_shown(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    began = time.monotonic()
    with (
        pytest.raises(Failure, match=r"does not answer after 0\.2 s \(--server-timeout\); the last lines of .*log"),
        vllm_server(model, "tiny", [], log, deadline_seconds=0.2),
    ):
        pass
    assert time.monotonic() - began < 60
    assert not _serving(model)


@pytest.mark.vllm
def test_a_server_that_ends_says_why_and_who_asks_it_goes_on_no_longer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any program that takes the server's arguments and ends; vLLM takes ten seconds to find an argument wrong.
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such tool parser\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(server.sys, "executable", str(program))
    with (
        pytest.raises(Failure, match=r"(?s)ended with exit code 3 before it answered; .*\nno such tool parser"),
        vllm_server(model, "tiny", [], tmp_path / "server.log", deadline_seconds=60),
    ):
        pass


@pytest.mark.vllm
def test_asking_ends_when_the_server_dies(python: Path, tmp_path: Path) -> None:
    def dead() -> None:
        raise Failure("vLLM's server has died with exit code -9")

    with pytest.raises(Failure, match="has died"):
        ask(Settings(("irrelevance",), limit=1), python, tmp_path, "http://127.0.0.1:9/v1", KEY, dead)


@pytest.fixture
def waiting(python: Path, model: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An evaluation whose server is starting."""
    command = [SLURMKIT, "evaluate", "bfcl", model, "--categories", "irrelevance", "--bfcl-python", python]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not _serving(model):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.vllm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_an_evaluation_ends_its_server_ends_with_it(
    waiting: subprocess.Popen[str], model: Path, number: signal.Signals
) -> None:
    waiting.send_signal(number)
    code = waiting.wait(60)
    assert code == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    until = time.monotonic() + 60
    while _serving(model):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_vllm_that_is_not_installed_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=r"vllm is not installed .* install slurmkit\[vllm\]"),
        vllm_server(tmp_path, "tiny", [], tmp_path / "log", deadline_seconds=1),
    ):
        pass


def test_nemo_evaluator_s_command_is_printed_and_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(("irrelevance",), limit=5)
    with pytest.raises(UserError, match=r"nemo-evaluator is not installed here.*install nvidia-bfcl"):
        nemo.evaluate(settings, Model(tmp_path, "tiny"), tmp_path / "out", print)
    assert capsys.readouterr().out.strip() == (
        "nemo-evaluator run_eval --eval_type bfclv3 --model_id slurmkit --model_url "
        "http://127.0.0.1:PORT/v1/chat/completions --model_type chat --api_key_name SLURMKIT_EVALUATE_KEY "
        f"--output_dir {tmp_path}/out --overrides config.params.parallelism=32,config.params.limit_samples=5"
    )
    assert not (tmp_path / "out").exists()


def test_an_environment_that_cannot_be_made_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nmkdir -p $3\necho ensurepip is not available\nexit 1\n")  # as on a bare Debian
    program.chmod(0o755)
    monkeypatch.setattr(installation.sys, "executable", str(program))
    with pytest.raises(Failure, match=r"cannot be made; give one with --bfcl-python:\nensurepip is not available"):
        bfcl_python(None, tmp_path / "cache", print)
    assert not list((tmp_path / "cache").iterdir())
