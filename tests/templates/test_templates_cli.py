"""`slurmkit templates list`, `show` and `diff`, for a site and a project together."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from slurmkit.job.render import PACKAGED
from tests.support.requirements import SLURMKIT

SITE = """{% extends "slurmkit/job.sbatch.j2" %}
{% block directives %}
{% for option, value in spec.directives() %}
#SBATCH --{{ option | raw }}{% if value is not none %}={{ value | directive }}{% endif %}

{% endfor %}
#SBATCH --nice=5
{% endblock %}
"""


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """A folder of a project at a site, both with templates of their own."""
    site, project = tmp_path / "etc", tmp_path / "my project"
    (site / "templates" / "container").mkdir(parents=True)
    (site / "site.yaml").write_text("templates: templates\nrequire: [account]\n")
    (site / "templates" / "job.sbatch.j2").write_text(SITE)
    (site / "templates" / "container" / "shifter.sh.j2").write_text("sk_container=(shifter)\n")
    (project / "ours" / "container").mkdir(parents=True)
    (project / "below").mkdir()
    (project / "slurmkit.yaml").write_text("profiles: {mine: {templates: ours}}\n")
    (project / "ours" / "container" / "none.sh.j2").write_text("sk_container=(nice)\n")
    return project / "below"


def templates(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SLURMKIT_SITE": str(here.parent.parent / "etc/site.yaml")}
    return subprocess.run(
        [SLURMKIT, "templates", *words], cwd=here, env=environment, capture_output=True, text=True, timeout=60
    )


def test_list_names_each_template_its_file_and_what_it_overrides(below: Path) -> None:
    done = templates(below, "list", "--profile", "mine")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    project, site = below.parent / "ours", below.parent.parent / "etc/templates"
    assert lines["container/none.sh.j2"] == f"{project}/container/none.sh.j2  over {PACKAGED}/container/none.sh.j2"
    assert lines["job.sbatch.j2"] == f"{site}/job.sbatch.j2  over {PACKAGED}/job.sbatch.j2"
    assert lines["container/shifter.sh.j2"] == f"{site}/container/shifter.sh.j2"
    assert lines["ray/bring_up.sh.j2"] == f"{PACKAGED}/ray/bring_up.sh.j2"
    without = templates(below, "list").stdout
    assert str(project) not in without


def test_show_prints_the_active_source_and_with_a_prefix_the_packaged_one(below: Path) -> None:
    assert templates(below, "show", "job.sbatch.j2").stdout == SITE
    assert templates(below, "show", "slurmkit/job.sbatch.j2").stdout == (PACKAGED / "job.sbatch.j2").read_text()
    wrong = templates(below, "show", "job.j2")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: there is no template 'job.j2'; the nearest is job.sbatch.j2\n"


def test_diff_shows_overridden_blocks_and_otherwise_whole_files(below: Path) -> None:
    done = templates(below, "diff", "--profile", "mine")
    site = below.parent.parent / "etc/templates"
    assert done.stdout.splitlines() == [
        f"--- {PACKAGED}/container/none.sh.j2",
        f"+++ {below.parent}/ours/container/none.sh.j2",
        "@@ -1 +1 @@",
        "-sk_container=()  # straight on the node",
        "+sk_container=(nice)",
        f"--- {PACKAGED}/job.sbatch.j2 block directives",
        f"+++ {site}/job.sbatch.j2 block directives",
        "@@ -2,3 +2,4 @@",
        " #SBATCH --{{ option | raw }}{% if value is not none %}={{ value | directive }}{% endif %}",
        " ",
        " {% endfor %}",
        "+#SBATCH --nice=5",
    ]
    assert "+sk_container=(shifter)" in templates(below, "diff", "container/shifter.sh.j2").stdout
    none = templates(below, "diff", "--templates", str(below))
    assert "+#SBATCH --nice=5" in none.stdout, "the site's remain"


def test_a_template_that_cannot_be_read_is_named(below: Path) -> None:
    path = below.parent.parent / "etc/templates/job.sbatch.j2"
    path.write_text('{% extends "slurmkit/job.sbatch.j2" %}\n{% block a\n')
    for command in ("diff", "check"):
        done = templates(below, command)
        assert done.returncode in (1, 2)
        assert f"{path}:" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    missing = templates(below, "list", "--templates", "/nowhere")
    assert missing.returncode == 2
    assert "/nowhere" in missing.stderr
