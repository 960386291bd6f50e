"""Requests that would break a site's rule by another name: each is refused, with the rule's file and line."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from slurmkit.errors import UserError
from slurmkit.job.site import read_site
from tests.job.test_site import Site

RULES = """\
defaults:
  sbatch: {mincpus: 4}
lock: [nodelist, qos, cpus_per_task]
limits:
  nodes: {max: 3}
  total_gpus: {max: 16}
  gpu_hours: {max: 100}
  time: {max: 1-0}
forbid:
  env: ["NCCL_*"]
partitions:
  whole: {defaults: {gres: gpu:h100:8, exclusive: true}}
  cpu: {defaults: {gres: gpu:0}}
"""
COUNT = "cannot be set: it does what gpus_per_node does, and the site has a rule for total_gpus (site.yaml:6)"
WHOLE = (
    "total_gpus cannot be counted: exclusive (command line: exclusive) gives the job all GPUs of its nodes, and "
    "nothing says how many these are: also give gres, gpus or gpus_per_node; the site limits it (site.yaml:6)"
)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, RULES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sbatch__gpus-per-task": "h100:8"}, f"(command line: sbatch.gpus-per-task) {COUNT}"),
        ({"sbatch__gpus-per-t": "h100:8"}, f"(command line: sbatch.gpus-per-t) {COUNT}"),
        ({"sbatch__gpus-per-socket": 8}, COUNT),
        ({"sbatch__tres-per-task": "gres/gpu:64"}, f"(command line: sbatch.tres-per-task) {COUNT}"),
        ({"nodes": 3, "exclusive": True}, WHOLE),
        ({"nodes": 3, "exclusive": "topo"}, WHOLE),
        ({"partition": "whole", "nodes": 3, "gres": None}, "total_gpus: 24 (nodes 3, command line: nodes; exclusive"),
        ({"partition": "whole", "nodes": 3, "gres": "gpu:1"}, "total_gpus: 24 (nodes 3, command line: nodes; gres gpu"),
        ({"gres": "shard:64", "time": "1-0", "array": "0-9"}, "gpu_hours: 240.0 (nodes 1, default; gres shard:64"),
        ({"gres": "mps:50", "time": "1-0", "array": "0-9"}, "gpu_hours: 240.0 (nodes 1, default; gres mps:50"),
        (
            {"sbatch__nodefile": "/f"},
            "sbatch.nodefile: '/f' (command line: sbatch.nodefile) cannot be set: it does what nodelist does, and the "
            "site has a rule for nodelist (site.yaml:3)",
        ),
        ({"sbatch__nodef": "/f"}, "sbatch.nodef: '/f' (command line: sbatch.nodef) cannot be set"),
        ({"sbatch__mincpus": 64}, "sbatch.mincpus: '64' (command line: sbatch.mincpus) cannot be set"),
        (
            {"sbatch__clusters": "other"},
            "sbatch.clusters: 'other' (command line: sbatch.clusters) cannot be set: it does what partition does, and "
            "the site has a rule for partitions (site.yaml:11)",
        ),
        ({"sbatch__cluster": "other"}, "sbatch.cluster: 'other' (command line: sbatch.cluster) cannot be set"),
        (
            {"secrets__NCCL_DEBUG": "env"},
            "secrets.NCCL_DEBUG (command line: secrets.NCCL_DEBUG) cannot be set: the site forbids NCCL_* "
            "(site.yaml:10)",
        ),
    ],
)
def test_another_name_for_a_key_does_not_evade_its_rule(site: Site, flags: dict[str, Any], message: str) -> None:
    assert any(message in line for line in site.refusal(**flags)), site.refusal(**flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"sbatch__licenses": "a:1", "sbatch__nice": 5},
        {"sbatch__mincpus": 4},
        {"gres": "gpu:h100:8", "nodes": 2, "exclusive": "user"},
        {"gres": "gpu:h100:8", "nodes": 2, "exclusive": True},
        {"partition": "whole", "nodes": 2},
        {"partition": "cpu", "exclusive": True},
        {"gres": "shard:4", "time": "60"},
        {"secrets__HF_TOKEN": "env"},
    ],
)
def test_what_no_rule_speaks_of_is_accepted(site: Site, flags: dict[str, Any]) -> None:
    site.settle(**flags)


def test_lint_finds_defaults_whose_gpus_the_site_s_own_limit_cannot_count(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("limits: {total_gpus: {max: 8}}\npartitions: {gpu: {defaults: {exclusive: true}}}\n")
    with pytest.raises(UserError, match=r"total_gpus cannot be counted: exclusive \(.*site.yaml:2\)"):
        read_site(path)


def contained(folder: Path, forbidden: Path | str) -> Site:
    work = folder / "work"
    work.mkdir()
    keys = f"{{container: {{runtime: podman, image: {folder}}}, results_dir: {work}, workdir: {work}}}"
    return Site(folder, f"defaults: {keys}\nforbid:\n  mounts: [{forbidden}]\n")


def test_a_forbidden_home_is_not_mounted_by_mount_home(tmp_path: Path) -> None:
    home = pwd.getpwuid(os.getuid()).pw_dir
    site = contained(tmp_path, home)
    site.settle()
    assert site.refusal(container__mount_home=True) == [
        f"container.mount_home: {home} (command line: container.mount_home) cannot be mounted: the site forbids {home} "
        "(site.yaml:3)"
    ]


def test_a_home_of_the_job_s_own_is_not_mounted_where_it_is_forbidden(tmp_path: Path) -> None:
    site = contained(tmp_path, tmp_path / "private")
    refused = site.refusal(container__mount_home=True, env__HOME=str(tmp_path / "private/x"))
    assert refused[0].startswith(f"container.mount_home: {tmp_path}/private/x")


def test_pyxis_options_of_sbatch_do_not_evade_the_rules_for_containers(tmp_path: Path) -> None:
    site = contained(tmp_path, "/etc")
    assert site.refusal(**{"sbatch__container-mounts": "/etc:/etc"}) == [
        "sbatch.container-mounts: '/etc:/etc' (command line: sbatch.container-mounts) cannot be set: it does what "
        "container does, and the site has a rule for forbid.mounts (site.yaml:3)"
    ]


@pytest.mark.parametrize("word", ["--bind=/etc", "-B/etc:/x", "--volume=/etc:/x", "--container-mounts=/etc:/etc"])
def test_options_of_the_runtime_do_not_mount_where_a_site_forbids_folders(tmp_path: Path, word: str) -> None:
    site = contained(tmp_path, "/etc")
    site.settle(container__options=["--device=/dev/infiniband"])
    assert site.refusal(container__options=[word]) == [
        f"container.options: {word!r} (command line: container.options) cannot be set: it mounts folders, and the site "
        "forbids some (site.yaml:3): use container.mounts"
    ]


def test_further_options_can_be_locked(tmp_path: Path) -> None:
    site = Site(tmp_path, "lock: [srun, container.options]\n")
    refused = site.refusal(srun=["--mpi=pmix"], container={"runtime": "pyxis", "image": "a", "options": ["--x"]})
    assert [line.partition(":")[0] for line in refused] == ["srun", "container.options"]


def templates(folder: Path, block: str) -> str:
    mine = folder / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "job.sbatch.j2").write_text(
        '{% extends "slurmkit/job.sbatch.j2" %}\n{% block directives %}\n' + block + "\n{% endblock %}\n"
    )
    return str(mine)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{{ super() }}#SBATCH --nodes=4", "nodes: 4 ({mine}/job.sbatch.j2: a #SBATCH line) is above the maximum of 3"),
        ("{{ super() }}#SBATCH -N 4 -t 9-0", "time: '9-0' ({mine}/job.sbatch.j2: a #SBATCH line) is above the maximum"),
        (
            "{{ super() }}#SBATCH --qos high",
            "qos: 'high' ({mine}/job.sbatch.j2: a #SBATCH line) cannot be set: the site",
        ),
        ("{{ super() }}#SBATCH --gpus-per-task=8", COUNT),
        ("{{ super() }}#SBATCH -F /f", "sbatch.nodefile: '/f' ({mine}/job.sbatch.j2: a #SBATCH line) cannot be set"),
        (
            "{{ super() }}#SBATCH --gpus-per-node=8 -N3",
            "total_gpus: 24 (nodes 3, {mine}/job.sbatch.j2: a #SBATCH line;",
        ),
        ("{{ super() }}#SBATCH --no-such", "no-such"),
        ("{{ super() }}#PBS -l nodes=9", "{mine}/job.sbatch.j2: '#PBS -l nodes=9' is not #SBATCH --OPTION=VALUE"),
        ("{{ super() }}#SBATCH hetjob", "'#SBATCH hetjob' is not #SBATCH --OPTION=VALUE"),
        ("#SBATCH --job-name=date", "account must be given: the site requires it"),
    ],
)
def test_a_project_s_template_adds_no_directive_that_breaks_a_rule(tmp_path: Path, block: str, message: str) -> None:
    site = Site(
        tmp_path, f"{RULES}require: [account]\n".replace("lock: [nodelist, ", "lock: [sbatch.no-such, nodelist, ")
    )
    mine = templates(tmp_path, block)
    refused = site.refusal(templates=mine, account="a")
    assert any(message.format(mine=mine) in line for line in refused), refused


def test_a_template_may_add_what_the_rules_allow(tmp_path: Path) -> None:
    site = Site(tmp_path, RULES)
    site.settle(templates=templates(tmp_path, '{{ super() }}#SBATCH --nodes=3 --licenses="a b" # a comment'))


def test_a_site_s_own_templates_may_add_any_directive(tmp_path: Path) -> None:
    folder = Path(templates(tmp_path, "{{ super() }}#SBATCH --nodes=9"))
    site = Site(tmp_path, f"{RULES}templates: {folder}\n")
    site.settle()
    other = tmp_path / "other"
    other.mkdir()
    (other / "job.sbatch.j2").write_text('{% extends "site/job.sbatch.j2" %}{% block epilogue %}true{% endblock %}')
    site.settle(templates=str(other))
