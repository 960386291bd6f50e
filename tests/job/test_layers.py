"""The layers that are no site's: user, project, run file, SLURMKIT_* and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurmkit.errors import UserError
from slurmkit.job.settle import Request, settle

DATE = Request(command=("date",))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_each_layer_beats_the_ones_below_it_and_is_named_as_the_origin(here: Path) -> None:
    keys = ["account", "qos", "comment", "reservation", "constraint", "mem", "partition"]

    def layer(number: int) -> str:
        return "".join(f"{key}: '{number}'\n" for key in keys[number:])

    site = write(here / "site.yaml", "defaults:\n" + "".join(f"  {key}: '0'\n" for key in keys))
    user = write(here / "home/.config/slurmkit/slurmkit.yaml", layer(1))
    text = layer(2) + "profiles:\n  p:\n" + "".join(f"    {key}: '3'\n" for key in keys[3:])
    project = write(here / "slurmkit.yaml", text)
    run_file = write(here / "job.yaml", layer(4))
    environ = {"SLURMKIT_SITE": str(site), "XDG_CONFIG_HOME": str(here / "home/.config")}
    environ |= {f"SLURMKIT_{key.upper()}": "5" for key in keys[5:]}
    flags = {"partition": "6"}
    settled = settle(Request(run_file, command=("date",), flags=flags, profile="p"), here, environ)
    assert [getattr(settled.spec, key) for key in keys] == ["0", "1", "2", "3", "4", "5", "6"]
    assert [settled.origins[key] for key in keys] == [
        f"{site}:2",
        f"{user}:1",
        f"{project}:1",
        f"{project}:8",
        f"{run_file}:1",
        "environment: SLURMKIT_MEM",
        "command line: partition",
    ]
    assert settled.sources == (site, user, project, run_file)


def test_variables_set_nested_keys_and_are_read_as_yaml(here: Path) -> None:
    environ = {
        "SLURMKIT_RAY__NUM_CPUS": "4",
        "SLURMKIT_ENV__MixedCase": "a: b: c",
        "SLURMKIT_EXCLUSIVE": "true",
        "SLURMKIT_SETUP": "[date, 'x y']",
        "SLURMKIT_DEVCLUSTER": "dev",
    }
    spec = settle(DATE, here, environ).spec
    assert (spec.ray.num_cpus, spec.env, spec.exclusive) == (4, {"MixedCase": "a: b: c"}, True)
    assert spec.setup == ("date", "x y")


def test_a_variable_that_sets_nothing_is_an_error_that_names_the_nearest(here: Path) -> None:
    with pytest.raises(UserError, match="SLURMKIT_PARTITON sets no key of a job; the nearest is SLURMKIT_PARTITION"):
        settle(DATE, here, {"SLURMKIT_PARTITON": "gpu"})


def test_a_null_takes_a_weaker_layer_s_value_out_again(here: Path) -> None:
    write(here / "slurmkit.yaml", "qos: low\nenv: {A: 1, B: 2}\nsbatch: {nice: 5}\n")
    run_file = write(here / "job.yaml", "qos: null\nenv: {A: null}\nsbatch: {nice: null}\n")
    spec = settle(Request(run_file, command=("date",)), here, {}).spec
    assert (spec.qos, spec.env, spec.sbatch) == (None, {"B": "2"}, {})


def test_strongest_layer_with_a_config_or_command_decides_which_one_runs(here: Path) -> None:
    write(here / "train.yaml", "env: {name: arithmetic}\npolicy: {from_scratch: {}}\ncluster: {gpus_per_node: 0}\n")
    write(here / "slurmkit.yaml", "config: train.yaml\noverrides: [grpo.seed=5]\n")
    run_file = write(here / "job.yaml", "command: [date]\n")
    assert settle(Request(run_file), here, {}).spec.command == ("date",)
    both = write(here / "both.yaml", "command: [date]\nconfig: train.yaml\n")
    with pytest.raises(UserError, match=r"both\.yaml: config and command exclude each other"):
        settle(Request(both), here, {})


def test_file_paths_are_relative_to_the_file_and_expand_home_and_variables(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "/some/where")
    write(here / "slurmkit.yaml", "results_dir: $SOMEWHERE/out\nworkdir: sub\npython: bin/python\n")
    (here / "below").mkdir()
    spec = settle(DATE, here / "below", {}).spec
    assert (spec.run_dir, spec.workdir) == ("/some/where/out/date", f"{here}/sub")
    assert spec.python == f"{here}/bin/python"
    write(here / "slurmkit.yaml", "python: python3.12\n")
    assert settle(DATE, here, {}).spec.python == "python3.12", "a bare name is found on the node's PATH"
