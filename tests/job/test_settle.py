"""Settling: layers over each other, the origin of every value, the training configuration filled in from the job."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from slurmkit.errors import UserError
from slurmkit.job.render import render
from slurmkit.job.settle import Request, settle

CONFIG = "env: {name: arithmetic}\npolicy: {from_scratch: {}}\ncluster: {gpus_per_node: 0}\n"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    directory = tmp_path / "a folder"
    directory.mkdir()
    (directory / "train.yaml").write_text(CONFIG)
    return directory


def refusal(request: Request, here: Path) -> str:
    with pytest.raises(UserError) as caught:
        settle(request, here)
    return str(caught.value)


def test_flags_beat_the_run_file_and_the_run_file_beats_the_project_file(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("nodes: 2\npartition: gpu\naccount: team\n")
    (here / "job.yaml").write_text("nodes: 3\npartition: big\ncommand: [date]\n")
    settled = settle(Request(run_file=here / "job.yaml", flags={"nodes": 4}), here)
    assert (settled.spec.nodes, settled.spec.partition, settled.spec.account) == (4, "big", "team")
    assert settled.origins["nodes"] == "command line: nodes"
    assert settled.origins["partition"] == f"{here}/job.yaml:2"
    assert settled.origins["account"] == f"{here}/slurmkit.yaml:3"
    assert settled.origins["workdir"] == "default"


def test_the_project_file_is_found_from_a_folder_below_it(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("partition: gpu\nresults_dir: out\n")
    below = here / "deep" / "er"
    below.mkdir(parents=True)
    spec = settle(Request(command=("date",)), below).spec
    assert spec.partition == "gpu"
    assert spec.run_dir == f"{here}/out/date", "a path in a file is relative to the file"


def test_a_command_on_the_command_line_beats_a_configuration_in_a_file(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("config: train.yaml\noverrides: [grpo.seed=5]\n")
    assert "seed: 5" in str(settle(Request(), here).spec.config)
    spec = settle(Request(command=("date",)), here).spec
    assert (spec.command, spec.config) == (("date",), None)


def test_numbers_in_a_file_may_stand_for_text(here: Path) -> None:
    (here / "job.yaml").write_text("time: 30\nmem: 64\nenv: {OMP_NUM_THREADS: 8}\ngpus_per_node: 8\ncommand: [date]\n")
    spec = settle(Request(run_file=here / "job.yaml"), here).spec
    assert (spec.time, spec.mem, spec.env, spec.gpus_per_node) == ("30", "64", {"OMP_NUM_THREADS": "8"}, "8")


def test_training_config_becomes_a_command_on_the_copy_in_the_run_dir(here: Path) -> None:
    settled = settle(Request(config=here / "train.yaml", overrides=("grpo.seed=5",), flags={"nodes": 2}), here)
    run_dir = f"{here}/results/train"
    assert settled.spec.command[1:] == ("-m", "slurmkit.grpo", f"--config={run_dir}/config.yaml")
    assert settled.spec.config is not None
    config = yaml.safe_load(settled.spec.config)
    assert config["cluster"]["num_nodes"] == 2
    assert config["checkpointing"]["checkpoint_dir"] == run_dir
    assert config["grpo"]["seed"] == 5
    assert config["loss_fn"]["ratio_clip_max"] == 0.2, "defaults are written out"


def test_the_copy_of_the_configuration_settles_to_itself(here: Path) -> None:
    settled = settle(Request(config=here / "train.yaml", flags={"nodes": 2}), here)
    assert settled.spec.config is not None
    (here / "copy.yaml").write_text(settled.spec.config)
    again = settle(Request(config=here / "copy.yaml", flags={"nodes": 2}), here)
    assert again.spec.config == settled.spec.config


def test_a_changed_configuration_changes_the_script(here: Path) -> None:
    scripts = {
        render(settle(Request(config=here / "train.yaml", overrides=(f"grpo.seed={seed}",)), here).spec)
        for seed in (1, 2)
    }
    assert len(scripts) == 2


def test_a_configured_checkpoint_directory_is_the_run_directory(here: Path) -> None:
    request = Request(config=here / "train.yaml", overrides=("checkpointing.checkpoint_dir=there/x",))
    assert settle(request, here).spec.run_dir == f"{here}/there/x"


@pytest.mark.parametrize(
    ("command", "name"), [("./my script.sh", "my-script.sh"), ("/usr/bin/[", "run"), ("-x", "x"), ("é", "run")]
)
def test_a_name_taken_from_a_command_is_one_that_a_folder_can_have(here: Path, command: str, name: str) -> None:
    assert settle(Request(command=(command,)), here).spec.name == name


def test_settling_changes_nothing_on_disk(here: Path) -> None:
    before = sorted(here.rglob("*"))
    settle(Request(config=here / "train.yaml"), here)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "nothing to run"),
        (Request(config=Path("train.yaml"), command=("date",)), "exclude each other"),
        (Request(command=("date",), overrides=("grpo.seed=1",)), "'grpo.seed=1' overrides a training configuration"),
        (Request(config=Path("none.yaml")), "none.yaml: no such file"),
        (Request(run_file=Path("none.yaml")), "none.yaml: no such file"),
        (Request(command=("date",), flags={"nodes": 0}), "nodes: should be greater than or equal to 1, not 0"),
        (
            Request(command=("date",), flags={"nods": 1}),
            "unknown key nods (command line: nods); the nearest known key is nodes",
        ),
        (
            Request(config=Path("train.yaml"), overrides=("cluster.num_nodes=3",), flags={"nodes": 2}),
            "cluster.num_nodes is 3 (command line: cluster.num_nodes=3) but the job has nodes 2 (command line: nodes)",
        ),
        (
            Request(
                config=Path("train.yaml"),
                overrides=("env.name=math", "data.train.data_path=x", "data.validation.data_path=x"),
            ),
            "data.train.data_path: ",
        ),
    ],
)
def test_a_request_that_cannot_work_is_refused(
    request_: Request, message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    assert message in refusal(request_, here)


def test_a_wrong_key_in_the_project_file_is_named_with_file_and_line(here: Path) -> None:
    (here / "slurmkit.yaml").write_text("partition: gpu\ncontainer:\n  runtim: none\n")
    message = refusal(Request(command=("date",)), here)
    assert message == (
        f"unknown key container.runtim ({here}/slurmkit.yaml:3); the nearest known key is container.runtime"
    )
