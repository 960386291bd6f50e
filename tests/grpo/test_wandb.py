"""A run in W&B: the figures, the conversations and the job's files, of all attempts in one run, and its upload."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from slurmkit.envs.environment import Message, ToolCall
from slurmkit.errors import UserError
from slurmkit.grpo import wandb_run
from slurmkit.grpo.metrics import RunLog
from slurmkit.grpo.sample_files import write_lines
from slurmkit.grpo.validation import write_transcripts
from slurmkit.run.offline import upload
from tests.support.driver import CANARY
from tests.support.groups import group
from tests.support.requirements import SLURMKIT, unchanged_environment
from tests.support.tiny_model import tiny_config
from tests.support.wandb_files import records
from tests.support.wandb_server import WandbServer, wandb_server

KEY = "b7" * 20
TAGS = ["sums", "a second one"]
SAID = (
    Message("user", "2+2?"),
    Message("assistant", "I ask.", tool_calls=(ToolCall("call_0", "add", '{"a": 2, "b": 2}'),)),
    Message("tool", "4", tool_call_id="call_0", name="add"),
    Message("assistant", "4"),
)
SAMPLE = {
    "finish_reason": "stop",
    "tokens": ["<|user|>2+2?", "<|assistant|>", "4", "<|end|>"],
    "mask": [0, 0, 1, 1],
    "logprobs": [None, None, -0.5, -0.1],
    "advantages": [0.0, 0.0, 1.0, 1.0],
}


def talk(folder: Path, step: int, text: str = "4") -> Path:
    said = (*SAID[:-1], Message("assistant", text))
    played = group(1.0, 0.0, name="sum")
    played = replace(played, episodes=tuple(replace(each, messages=said) for each in played.episodes))
    return write_transcripts(folder, step, [played])


def train_sample(folder: Path, step: int) -> Path:
    path = folder / "samples" / f"step_{step}.jsonl"
    write_lines(path, [{"task": "sum", "group": 0, "reward": 1.0, "correct": True, "samples": [SAMPLE]}])
    return path


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after two attempts: steps 0 to 2, and, from the checkpoint of step 1 on, 2 and 3."""
    run = tmp_path_factory.mktemp("results") / "sums"
    (run / "attempts").mkdir(parents=True)
    (run / "job.sbatch").write_text("#!/bin/bash\nsecrets=(WANDB_API_KEY)\n")
    (run / "config.yaml").write_text("grpo: {seed: 1}\n")
    (run / "settled.json").write_text("{}\n")
    (run / "slurm-7.out").write_text(f"not this: {CANARY}")
    asked = {"mode": "offline", "project": "sums", "tags": TAGS, "group": "seeds", "notes": "Whether it learns."}
    config = tiny_config(run, logger={"wandb_enabled": True, "wandb": asked})
    with unchanged_environment():
        os.environ.pop("WANDB_DATA_DIR", None)
        os.environ.update(WANDB_API_KEY=KEY, SOME_SECRET=CANARY)
        for number, resume_after, steps in ((0, None, (0, 1, 2)), (1, 1, (2, 3))):
            attempt = run / f"attempts/{number + 7}.0"
            attempt.mkdir()
            (attempt / "start.json").write_text(json.dumps({"job_id": str(number + 7), "nodes": "node1"}))
            (attempt / "driver.log").write_text(f"not this: {CANARY}")
            (run / "run.json").write_text(json.dumps({"identity": {}, "attempts": [{"job_id": "7"}] * (number + 1)}))
            with RunLog(run, config, last_step=3, resume_after=resume_after) as log:
                for step in steps:
                    if step != 1:
                        log.show("val", talk(run, step))
                    if step == 3:
                        log.show("train", train_sample(run, step))
                    log.write(step, {"train:loss": step / 2, "val:accuracy": 0.25})
            (attempt / "end.json").write_text(json.dumps({"code": 0, "reason": ""}))
            time.sleep(1)  # W&B names an attempt's folder by the second
    return run


def attempts(run: Path) -> list[list[Record]]:
    """What each attempt has told W&B."""
    return [list(records(file)) for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]


def of_kind(told: list[Record], kind: str) -> list[Any]:
    return [getattr(each, kind) for each in told if each.WhichOneof("record_type") == kind]


def history(told: list[Record]) -> list[dict[str, Any]]:
    """The lines of one attempt, with their steps."""
    lines = []
    for record in of_kind(told, "history"):
        line: dict[str, Any] = {}
        for item in record.item:
            *outer, name = item.nested_key or [item.key]
            place = line
            for key in outer:
                place = place.setdefault(key, {})
            place[name] = json.loads(item.value_json)
        lines.append({"_step": record.step.num, **line})
    return lines


def rows(run: Path, shown: dict[str, Any]) -> list[dict[str, Any]]:
    """A table, from what a line says of it."""
    (path,) = (run / "wandb").glob(f"offline-run-*/files/{shown['path']}")
    table = json.loads(path.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_all_attempts_log_to_one_run_with_the_set_tags_group_and_notes(logged: Path) -> None:
    told = attempts(logged)
    assert len(told) == 2
    for attempt in told:
        (run,) = of_kind(attempt, "run")
        assert run.run_id == (logged / "wandb/run_id").read_text()
        assert (run.project, sorted(run.tags), run.run_group, run.notes) == (
            *("sums", sorted(TAGS), "seeds", "Whether it learns."),
        )


def test_each_logged_step_has_the_names_and_values_of_metrics_jsonl(logged: Path) -> None:
    first, second = map(history, attempts(logged))
    assert [line["_step"] for line in first] == [0, 1, 2]
    assert [line["_step"] for line in second] == [2, 3]
    written = [json.loads(line) for line in (logged / "metrics.jsonl").read_text().splitlines()]
    figures = [*first[:2], *second]
    for line, own in zip(figures, written, strict=True):
        names = own.keys() - {"step", "last_step"}
        assert {name: line[name] for name in names} == {name: own[name] for name in names}
        assert {name for name in line if name.startswith(("train:", "val:"))} - names <= {
            *("val:conversations", "train:conversations"),
        }


def test_validation_and_samples_are_tables_with_the_attempts_tool_calls(
    logged: Path,
) -> None:
    first, second = map(history, attempts(logged))
    assert ["val:conversations" in line for line in (*first, *second)] == [True, False, True, True, True]
    right, wrong = rows(logged, second[1]["val:conversations"])
    assert right == {
        **{"step": 3, "task": "sum", "reward": 1.0, "correct": True, "finish_reason": "stop", "turns": 2},
        "conversation": (
            '[user]\n2+2?\n\n[assistant]\nI ask.\n-> add({"a": 2, "b": 2})\n\n[tool add]\n4\n\n[assistant]\n4'
        ),
    }
    assert (wrong["reward"], wrong["correct"]) == (0.0, False)
    (sample,) = rows(logged, second[1]["train:conversations"])
    assert (sample["conversation"], sample["turns"]) == ("<|user|>2+2?<|assistant|>4<|end|>", 1)


def test_job_files_are_an_artifact_in_the_run_dir_one_version_per_attempt(
    logged: Path,
) -> None:
    run_id = (logged / "wandb/run_id").read_text()
    files = ["attempts/7.0/start.json", "config.yaml", "job.sbatch", "run.json", "settled.json"]
    later = ["attempts/7.0/end.json", *files[:1], "attempts/8.0/start.json", *files[1:]]
    for told, expected in zip(attempts(logged), (files, later), strict=True):
        (artifact,) = [each for each in of_kind(told, "artifact") if each.type == "slurmkit"]
        assert artifact.name == f"slurmkit-{run_id}"
        entries = {each.path: Path(each.local_path) for each in artifact.manifest.contents}
        assert sorted(entries) == expected
        assert all(path.is_relative_to(logged / "wandb") for path in entries.values())
        assert entries["job.sbatch"].read_text() == (logged / "job.sbatch").read_text()


def test_nothing_of_the_environment_and_of_other_files_goes_to_wandb(logged: Path) -> None:
    files = [path for path in (logged / "wandb").rglob("*") if path.is_file()]
    content = {path: path.read_bytes() for path in files}
    assert any(b"secrets=(WANDB_API_KEY)" in each for each in content.values()), "the artifact is searched"
    assert not [path for path, each in content.items() if CANARY.encode() in each or KEY.encode() in each]


def test_table_size_is_bounded_for_long_and_many_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "_CHARS", 100)
    line = {"task": "t", "reward": 1, "correct": True, "finish_reason": "stop"}
    text = "begin" + "x" * 500 + "end"
    row = wandb_run._row({**line, "messages": [{"role": "assistant", "content": text}]})
    assert row[-1].startswith("[assistant]\nbegin")
    assert row[-1].endswith("xend")
    assert "[… 420 characters left out …]" in row[-1]
    assert len(row[-1]) < 150
    shown = wandb_run.WandbRun.__new__(wandb_run.WandbRun)
    shown._shown = {}
    write_lines(tmp_path / "many.jsonl", [{**line, "messages": []}] * 100)
    shown.show("val", tmp_path / "many.jsonl")
    assert len(shown._shown["val:conversations"]) == wandb_run._ROWS


def sync(run: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    kept |= {"HOME": str(run.parent), "NETRC": str(run.parent / "none")}
    return subprocess.run(
        [SLURMKIT, "sync", run.name, *options],
        cwd=run.parent.parent,
        env={**kept, "SLURMKIT_RESULTS_DIR": str(run.parent), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with wandb_server(KEY) as made:
        yield made


def test_dry_run_lists_uploads_and_upload_requires_an_api_key(logged: Path) -> None:
    run_id = (logged / "wandb/run_id").read_text()
    told = sync(logged, "--dry-run")
    assert (told.returncode, told.stderr) == (0, "")
    first, second = told.stdout.splitlines()
    for line, folder in zip((first, second), sorted((logged / "wandb").glob("offline-run-*")), strict=True):
        assert line.startswith(f"would upload {folder} (")
        assert line.endswith(f"to the run {run_id}")
    refused = sync(logged)
    assert refused.returncode == 2
    assert "there is neither WANDB_API_KEY nor" in refused.stderr


def test_refused_key_fails_naming_the_missing_uploads_and_not_the_key(logged: Path, server: WandbServer) -> None:
    other = "c9" * 20
    done = sync(logged, WANDB_API_KEY=other, WANDB_BASE_URL=server.url)
    assert done.returncode == 1
    assert "error: not uploaded, see above" in done.stderr
    assert done.stderr.count("offline-run-") >= 2
    assert other not in done.stdout + done.stderr
    assert not server.runs


def test_sync_uploads_all_attempts_in_order_to_one_run_and_nothing_twice(logged: Path, server: WandbServer) -> None:
    run_id = (logged / "wandb/run_id").read_text()
    done = sync(logged, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    assert {each["name"] for each in server.runs} == {run_id}
    assert all(sorted(each["tags"]) == sorted(TAGS) for each in server.runs if each["tags"])
    assert any(each["tags"] for each in server.runs)
    assert [each["artifactCollectionName"] for each in server.artifacts].count(f"slurmkit-{run_id}") == 2
    assert {name for name, _ in server.lines} == {run_id}
    assert [line["_step"] for _, line in server.lines] == [0, 1, 2, 2, 3]
    tables = [line["val:conversations"]["path"] for _, line in server.lines if "val:conversations" in line]
    assert len(tables) == 4
    assert set(tables) <= server.files
    again = sync(logged, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert (again.returncode, again.stdout) == (0, "2 uploaded before\n")


def test_a_run_that_logged_nothing_offline_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = tmp_path / "results" / "plain"
    (run / "attempts").mkdir(parents=True)
    refused = sync(run)
    assert refused.returncode == 2
    assert "plain has nothing offline to upload: it did not log to W&B (logger.wandb_enabled)" in refused.stderr


def test_attempt_killed_before_any_wandb_data_does_not_block_other_uploads(
    tmp_path: Path,
) -> None:
    run = tmp_path / "results" / "killed"
    (run / "attempts").mkdir(parents=True)
    # What W&B's process leaves that is killed in its first seconds, and what one that was not.
    for moment, content in (("1", b":W&B\0\0"), ("2", b":W&B\0\0" + bytes(100))):
        folder = run / f"wandb/offline-run-2026010{moment}_000000-ab12"
        folder.mkdir(parents=True)
        (folder / "run-ab12.wandb").write_bytes(content)
    first, second = sync(run, "--dry-run").stdout.splitlines()
    assert first.startswith("left out ")
    assert first.endswith("offline-run-20260101_000000-ab12: its attempt was killed before W&B wrote anything")
    assert second.startswith("would upload ")
    assert "20260102" in second


def test_a_run_that_is_still_being_written_is_not_uploaded(tmp_path: Path) -> None:
    attempt = tmp_path / "results" / "busy" / "attempts" / "local-1"
    attempt.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()  # slurmkit run"], stdin=subprocess.PIPE) as process:
        start = {"local": "local-1", "attempt": 1, "pid": process.pid, "nodes": "here", "started": int(time.time())}
        (attempt / "start.json").write_text(json.dumps({**start, "previous": None}))
        refused = sync(attempt.parents[1])
        assert process.stdin is not None
        process.stdin.close()
    assert refused.returncode == 2
    assert "busy is running, and what it logs is not whole: upload it when it has ended" in refused.stderr


def test_without_wandb_the_upload_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed here, and uploading takes it: slurmkit\[train\]"):
        upload([])
