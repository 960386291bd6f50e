"""A site's file: its defaults reach every job, its rules are kept, and each refusal says where the rule stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmkit.errors import UserError
from slurmkit.job.draft import draft
from slurmkit.job.settle import Request, Settled, settle
from slurmkit.job.site import read_site
from slurmkit.slurm.client import Gres, Partition


class Site:
    """A site's file, and jobs settled under it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path = folder / "site.yaml"
        self.path.write_text(text)
        self.folder = folder

    def settle(self, *, partition: str | None = None, run_file: Path | None = None, **flags: Any) -> Settled:
        given = flags if partition is None else {**flags, "partition": partition}
        keys = {name.replace("__", "."): value for name, value in given.items()}
        request = Request(run_file=run_file, command=("date",), flags=keys)
        return settle(request, self.folder, {"SLURMKIT_SITE": str(self.path), "HOME": str(self.folder)})

    def refusal(self, **flags: Any) -> list[str]:
        with pytest.raises(UserError) as caught:
            self.settle(**flags)
        return [line.replace(f"{self.path}:", "site.yaml:") for line in str(caught.value).splitlines()]


RULES = """\
defaults:
  time: 60
  partition: cpu
  ray: {start_timeout: 300}
lock: [ray.start_timeout, sbatch.nice]
require: [account]
limits:
  nodes: {max: 4}
  time: {min: 5, max: 1-00:00:00}
  mem: {max: 512G}
  account: {pattern: "proj-[0-9]+"}
  partition: {allowed: [cpu, gpu]}
  total_gpus: {max: 16}
  gpu_hours: {max: 100}
partitions:
  gpu:
    defaults:
      gres: gpu:h100:8
      sbatch: {nice: 5}
    require: [qos]
    limits:
      nodes: {max: 2}
      gres: {max: 8}
      cpus_per_task: {allowed: [8, 16]}
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, RULES.replace("lock: [ray.start_timeout, sbatch.nice]", "lock:\n  - ray.start_timeout"))


def test_a_site_s_defaults_are_the_weakest_layer_and_keep_their_origin(site: Site) -> None:
    settled = site.settle(account="proj-1")
    assert (settled.spec.time, settled.spec.partition) == ("60", "cpu")
    assert settled.origins["time"] == f"{site.path}:2"
    assert site.settle(account="proj-1", time="2:00:00").spec.time == "2:00:00"


def test_a_partition_has_defaults_of_its_own(site: Site) -> None:
    settled = site.settle(partition="gpu", account="proj-1", qos="q")
    assert settled.spec.gres == "gpu:h100:8"
    assert settled.origins["gres"] == f"{site.path}:19"
    assert settled.spec.sbatch == {"nice": "5"}
    assert site.settle(partition="cpu", account="proj-1").spec.gres is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"ray__start_timeout": 60},
            "ray.start_timeout: 60 (command line: ray.start_timeout) cannot be set: the site locks it to 300 "
            "(site.yaml:6)",
        ),
        ({"account": None}, "account must be given: the site requires it (site.yaml:7)"),
        (
            {"nodes": 5},
            "nodes: 5 (command line: nodes) is above the maximum of 4, by the site's rule (site.yaml:9)",
        ),
        (
            {"time": "4"},
            "time: '4' (command line: time) is below the minimum of 5, by the site's rule (site.yaml:10)",
        ),
        (
            {"time": "1-00:00:01"},
            "time: '1-00:00:01' (command line: time) is above the maximum of 1-00:00:00, by the site's rule "
            "(site.yaml:10)",
        ),
        ({"time": "0"}, "time: '0' (command line: time) is above the maximum of 1-00:00:00"),
        ({"mem": "1T"}, "mem: '1T' (command line: mem) is above the maximum of 512G"),
        ({"mem": "0"}, "mem: '0' (command line: mem) is above the maximum of 512G"),
        ({"account": "x"}, "account: 'x' (command line: account) does not match the pattern proj-[0-9]+"),
        ({"account": "proj-1x"}, "account: 'proj-1x' (command line: account) does not match the pattern proj-[0-9]+"),
        ({"partition": "big"}, "partition: 'big' (command line: partition) is not one of cpu, gpu"),
        ({"partition": "cpu,big"}, "partition: 'cpu,big' (command line: partition) is not one of cpu, gpu"),
        (
            {"gpus_per_node": "h100:8", "nodes": 3},
            "total_gpus: 24 (nodes 3, command line: nodes; gpus_per_node h100:8, command line: gpus_per_node) is above "
            "the maximum of 16, by the site's rule (site.yaml:14)",
        ),
        (
            {"gpus": "8", "time": "24:00:00"},
            "gpu_hours: 192.0 (nodes 1, default; gpus 8, command line: gpus; time 24:00:00, command line: time) is "
            "above the maximum of 100",
        ),
        ({"gpus": "1", "time": "5:00:00", "array": "0-40:2"}, "gpu_hours: 105.0 (nodes 1, default; gpus 1"),
        ({"gpus": "1", "time": "0"}, "gpu_hours: inf (nodes 1, default; gpus 1"),
        (
            {"partition": "gpu", "qos": "q", "nodes": 3},
            "nodes: 3 (command line: nodes) is above the maximum of 2 for partition gpu, by the site's rule "
            "(site.yaml:23)",
        ),
        ({"partition": "gpu", "qos": "q", "gres": "gpu:h100:16"}, "gres: 'gpu:h100:16'"),
        ({"partition": "gpu", "qos": "q", "cpus_per_task": 4}, "cpus_per_task: 4 (command line: cpus_per_task) is not"),
        ({"partition": "gpu"}, "qos must be given for partition gpu: the site requires it (site.yaml:21)"),
        ({"partition": "cpu,gpu"}, "qos must be given for partition gpu"),
    ],
)
def test_a_broken_rule_is_refused_by_key_value_origin_and_the_rule_s_line(
    site: Site, flags: dict[str, Any], message: str
) -> None:
    assert any(line.startswith(message) for line in site.refusal(**{"account": "proj-1", **flags}))


def test_all_broken_rules_are_told_at_once(site: Site) -> None:
    assert len(site.refusal(account="x", nodes=9, time="9-00:00:00")) == 3


def test_a_locked_key_may_be_repeated_with_the_same_value(site: Site) -> None:
    assert site.settle(account="proj-1", ray__start_timeout=300).spec.ray.start_timeout == 300


def test_a_locked_key_cannot_be_taken_away_by_a_null(tmp_path: Path) -> None:
    site = Site(tmp_path, "defaults: {qos: low}\nlock: [qos]\n")
    assert site.refusal(qos=None) == [
        "qos (command line: qos) cannot be left out: the site locks it to 'low' (site.yaml:2)"
    ]


def test_a_locked_key_without_a_default_stays_unset(tmp_path: Path) -> None:
    site = Site(tmp_path, "lock: [reservation, sbatch]\n")
    assert site.settle(nodes=2).spec.reservation is None
    assert site.refusal(reservation="mine", sbatch__nice=1) == [
        "reservation: 'mine' (command line: reservation) cannot be set: the site locks it (site.yaml:1)",
        "sbatch: {'nice': 1} (command line: sbatch.nice) cannot be set: the site locks it (site.yaml:1)",
    ]


def test_a_locked_section_locks_everything_in_it(tmp_path: Path) -> None:
    site = Site(tmp_path, "defaults: {ray: {num_cpus: 4}}\nlock: [ray]\n")
    assert site.refusal(ray__start_timeout=60)[0].startswith("ray: {'num_cpus': 4, 'start_timeout': 60}")


def test_locked_templates_keep_a_project_s_out(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    site = Site(tmp_path, "lock: [templates]\n")
    assert "templates: " in site.refusal(templates=str(tmp_path / "mine"))[0]


def test_what_a_site_adds_is_in_every_job_and_cannot_be_set_otherwise(tmp_path: Path) -> None:
    site = Site(tmp_path, "add:\n  env: {NIC: ib0}\n  prologue: [module load cuda]\n  epilogue: [sync]\n")
    spec = site.settle(setup=["ulimit -c 0"], epilogue=["date"]).spec
    assert (spec.env, spec.prologue, spec.setup) == ({"NIC": "ib0"}, ("module load cuda",), ("ulimit -c 0",))
    assert spec.epilogue == ("date", "sync"), "the site has the last word"
    assert site.settle(env__NIC="ib0").spec.env == {"NIC": "ib0"}
    assert site.refusal(env__NIC="eth0") == [
        "env.NIC: 'eth0' (command line: env.NIC) cannot be set: the site sets it to 'ib0' (site.yaml:2)"
    ]
    (tmp_path / "job.yaml").write_text("prologue: [date]\n")
    with pytest.raises(UserError, match=r"prologue .* is the site's to set: write setup"):
        site.settle(run_file=tmp_path / "job.yaml")


def test_forbidden_environment_names_are_refused_with_the_rule_s_line(tmp_path: Path) -> None:
    site = Site(tmp_path, "add: {env: {NCCL_A: x}}\nforbid:\n  env:\n  - LD_PRELOAD\n  - NCCL_*\n")
    assert site.refusal(env__NCCL_B="1", env__LD_PRELOAD="x") == [
        "env.LD_PRELOAD (command line: env.LD_PRELOAD) cannot be set: the site forbids LD_PRELOAD (site.yaml:4)",
        "env.NCCL_B (command line: env.NCCL_B) cannot be set: the site forbids NCCL_* (site.yaml:5)",
    ]


def test_a_site_file_that_is_named_must_exist_and_an_empty_name_is_none(tmp_path: Path) -> None:
    request = Request(command=("date",))
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        settle(request, tmp_path, {"SLURMKIT_SITE": str(tmp_path / "none.yaml")})
    assert settle(request, tmp_path, {"SLURMKIT_SITE": ""}).spec.nodes == 1


def test_profiles_of_site_and_project_are_laid_together_below_the_run_file(tmp_path: Path) -> None:
    site = Site(tmp_path, "profiles: {debug: {time: 10, nodes: 2, env: {A: 1}}}\n")
    (tmp_path / "slurmkit.yaml").write_text("time: 20\nprofiles:\n  debug: {nodes: 3, env: {B: 2}}\n")
    (tmp_path / "job.yaml").write_text("env: {B: 3}\n")
    environ = {"SLURMKIT_SITE": str(site.path), "SLURMKIT_PROFILE": "debug"}
    settled = settle(Request(run_file=tmp_path / "job.yaml", command=("date",)), tmp_path, environ)
    assert (settled.spec.time, settled.spec.nodes, settled.spec.env) == ("10", 3, {"A": "1", "B": "3"})
    assert settled.origins["time"] == f"{site.path}:1"
    assert settled.origins["nodes"] == f"{tmp_path}/slurmkit.yaml:3"
    with pytest.raises(UserError, match=r"no profile 'x' \(--profile\); there are debug"):
        settle(Request(command=("date",), profile="x"), tmp_path, environ)


def test_a_drafted_site_file_passes_lint_and_holds_what_the_cluster_said(tmp_path: Path) -> None:
    h100, a100 = Gres("gpu", "h100", 8), Gres("gpu", "a100", 4)
    partitions = [
        Partition("batch", True, "UP", 4, 1440, 60, None, (h100,), (16, 16), (64000, 64000)),
        Partition("mixed: #1", False, "DRAIN", 20, None, None, 8, (h100, a100), (16, 64), (64000, 512000)),
        Partition("empty", False, "INACTIVE", 0, None, None, None, (), (0, 0), (0, 0)),
    ]
    path = tmp_path / "site.yaml"
    path.write_text(draft(partitions, pyxis=False))
    site = read_site(path)
    assert site.rules.defaults["partition"] == "batch"
    assert list(site.rules.partitions) == ["batch", "mixed: #1", "empty"]
    limits = site.rules.partitions["batch"].limits
    assert (limits["nodes"].max, limits["time"].max) == (4, "1-00:00:00")
    assert site.rules.partitions["mixed: #1"].limits["nodes"].max == 8
    assert "DRAIN, 20 nodes: 16 to 64 CPUs, 64000 to 512000 MB, gpu:a100:4, gpu:h100:8" in path.read_text()
    assert "pyxis is not installed" in path.read_text()


TYPES = st.sampled_from(["", "h100", "2080ti", "4090", "1g.5gb", "nvidia_h100_80gb_hbm3_1g.10gb", "a100-sxm4+"])
GRES = st.builds(Gres, st.sampled_from(["gpu", "shard", "nic"]), TYPES, st.integers(1, 2**20))
WORD = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"], exclude_characters=",'"), min_size=1)
PARTITIONS = st.builds(
    Partition,
    WORD | st.sampled_from(["1", "1:30", "null", "yes", "gpu:8", "1e3", "0:"]),
    st.booleans(),
    st.just("UP"),
    st.integers(0, 9),
    st.none() | st.integers(0, 10**6),
    st.none(),
    st.none() | st.integers(1, 20),
    st.lists(GRES, max_size=3).map(tuple),
    st.just((1, 2)),
    st.just((1, 2)),
)


@settings(max_examples=60, deadline=None)
@given(partitions=st.lists(PARTITIONS, max_size=3, unique_by=lambda partition: partition.name))
def test_every_draft_passes_lint_with_its_suggestions(
    partitions: list[Partition], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("draft") / "site.yaml"
    text = draft(partitions, pyxis=False)
    for written in (text, text.replace("# defaults:", "defaults:")):
        path.write_text(written)
        assert list(read_site(path).rules.partitions) == [partition.name for partition in partitions]


@pytest.fixture
def in_a_container(tmp_path: Path) -> Site:
    for name in ("data", "home", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    text = f"""\
defaults: {{container: {{runtime: podman, image: {tmp_path}}}, results_dir: {tmp_path}/work, workdir: {tmp_path}/work}}
forbid:
  mounts:
  - {tmp_path}/home
add: {{mounts: ["./data:/data"]}}
"""
    return Site(tmp_path, text)


def test_a_site_s_mounts_are_in_every_container(in_a_container: Site) -> None:
    folder = in_a_container.folder
    spec = in_a_container.settle(container__mounts=["./work:/w:ro"]).spec
    assert [str(mount) for mount in spec.container.mounts] == [f"{folder}/work:/w:ro", f"{folder}/data:/data"]
    assert in_a_container.settle(container={"runtime": "none", "image": None}).spec.container.mounts == ()


@pytest.mark.parametrize("source", ["home", "home/deep", "link", "."])
def test_mounting_a_forbidden_folder_its_content_or_its_parent_is_refused(in_a_container: Site, source: str) -> None:
    folder = in_a_container.folder
    path = folder if source == "." else folder / source
    assert in_a_container.refusal(container__mounts=[f"{path}:/x"]) == [
        f"container.mounts: {path} (command line: container.mounts and site.yaml:5) cannot be mounted: the site "
        f"forbids {folder}/home (site.yaml:4)"
    ]


def test_a_forbidden_working_directory_is_not_mounted_either(in_a_container: Site) -> None:
    home = in_a_container.folder / "home"
    assert in_a_container.refusal(workdir=str(home))[0].startswith(f"container.mounts: {home} (workdir) cannot be")
