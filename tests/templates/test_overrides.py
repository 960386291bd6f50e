"""Overrides by a site or a project: what they may replace, that values stay quoted, and what a broken one says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slurmkit.errors import UserError
from slurmkit.job import sandbox
from slurmkit.job.render import render
from slurmkit.job.spec import JobSpec
from tests.support.requirements import HOSTILE

EXTENDS = '{% extends "slurmkit/job.sbatch.j2" %}\n'
BLOCKS = ("directives", "environment", "modules", "attempt", "preflight", "bring_up", "command", "launch", "epilogue")


def spec(**keys: object) -> JobSpec:
    minimal = {"name": "t", "python": "/usr/bin/python3", "workdir": "/w", "run_dir": "/r", "command": ["true"]}
    return JobSpec.model_validate({**minimal, **keys})


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "a site"
    folder.mkdir()
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def write(folder: Path, text: str, name: str = "job.sbatch.j2") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def refusal(*folders: Path, **keys: object) -> str:
    with pytest.raises(UserError) as caught:
        render(spec(**keys), folders)
    return str(caught.value)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_can_be_overridden_and_keeps_ours_with_super(block: str, site: Path) -> None:
    write(site, f"{EXTENDS}{{% block {block} %}}\n# before\n{{{{ super() }}}}\n# after\n{{% endblock %}}\n")
    lines = [line for line in render(spec(epilogue=["date"]), (site,)).splitlines() if line]
    ours = [line for line in render(spec(epilogue=["date"])).splitlines() if line]
    added = lines.index("# before"), lines.index("# after")
    assert added[1] - added[0] >= 2, "the packaged block stands between the two"
    without = [line for line in lines if line not in ("# before", "# after")]
    assert [line for line in without if "templates sha256" not in line] == [
        line for line in ours if "templates sha256" not in line
    ]


def test_a_project_extends_the_site_and_the_site_extends_the_packaged_file(site: Path, project: Path) -> None:
    write(site, EXTENDS + "{% block environment %}\n{{ super() }}\nexport SITE=1\n{% endblock %}\n")
    write(
        project,
        '{% extends "site/job.sbatch.j2" %}\n'
        "{% block environment %}\n{{ super() }}\nexport PROJECT=1\n{% endblock %}\n",
    )
    both = render(spec(env={"OURS": "1"}), (project, site))
    assert both.index("export OURS=1") < both.index("export SITE=1") < both.index("export PROJECT=1")
    alone = render(spec(), (project,))
    assert "export PROJECT=1" in alone
    assert "SITE" not in alone, "without a site, site/ is the packaged file"


def test_a_site_replaces_one_included_file_and_may_ask_for_ours(site: Path) -> None:
    write(site, 'module list\n{% include "slurmkit/ray/bring_up.sh.j2" %}\n', "ray/bring_up.sh.j2")
    script = render(spec(), (site,))
    assert "module list\n# ---- Ray on every node." in script


def test_a_new_file_in_container_is_a_new_runtime(site: Path) -> None:
    keys = {"container": {"runtime": "shifter", "image": "/images/train"}}
    assert "has no template container/shifter.sh.j2; there are " in refusal(**keys)
    write(site, "sk_container=(shifter --image={{ spec.container.image }})\n", "container/shifter.sh.j2")
    assert "sk_container=(shifter --image=/images/train)" in render(spec(**keys), (site,))


# How a template may put out a value, with the text that bash must read from it.
QUOTED = {
    "{{ v }}": "{}",
    "{{ 'a' ~ v }}": "a{}",
    "{{ ('a=' | raw) ~ v }}": "a={}",
    "{{ 'a=' | raw ~ v ~ ('b' | raw) }}": "a={}b",
    "{% set x %}a={{ v }}{% endset %}{{ x }}": "a={}",
    "{% set x %}a={% endset %}{{ x ~ v }}": "a={}",
    "{% macro m(x) %}a={{ x }}{% endmacro %}{{ m(v) }}": "a={}",
    "{% macro m() %}a={% endmacro %}{{ m() ~ v }}": "a={}",
    "{% macro m() %}a={{ caller() }}{% endmacro %}{% call m() %}{{ v }}{% endcall %}": "a={}",
    "{{ ['a', v] | join(',') }}": "a,{}",
    "{{ ['a=' | raw, v] | join }}": "a={}",
    "{{ 'aXb' | raw | replace('X', v) }}": "a{}b",
    "{{ 'aXb' | replace('X', v) }}": "a{}b",
    "{% set x %}aXb{% endset %}{{ x | replace('X', v) }}": "a{}b",
    "{{ v | default('x') }}": "{}",
    "{{ [v] | first }}": "{}",
    "{{ 'a' + v }}": "a{}",
    "{{ [v] | map('trim') | first | replace('X', v) }}": None,
    "{% autoescape false %}{{ v }}{% endautoescape %}": "{}",
    "{% autoescape false %}{{ ('a=' | raw) ~ v }}{% endautoescape %}": "a={}",
    "{% filter trim %}{{ v }}{% endfilter %}": None,
    "{% for x in [v] %}{{ loop.index ~ x }}{% endfor %}": "1{}",
}
REFUSED = (
    *("{{ v | safe }}", "{{ v | e }}", "{{ v | escape }}", "{{ v | forceescape }}", "{{ v | tojson }}"),
    *("{{ {v: v} | xmlattr }}", "{{ v | urlize }}", "{{ '%s' | raw | format(v) }}", "{{ ('%s' | raw) % v }}"),
    *("{{ ('{}' | raw).format(v) }}", "{{ ('a' | raw) + v }}", "{{ v + ('a' | raw) }}", "{{ ('' | raw).join([v]) }}"),
    *("{% set x %}{% endset %}{{ x + v }}", "{{ ('x' | raw).replace('x', v) }}", "{{ ('' | raw)['join']([v]) }}"),
    *("{{ v | attr('__html__') }}", "{{ ('a' | raw)[:0] ~ [v] }}", "{{ v | map('safe') | join }}"),
)


@pytest.mark.parametrize("form", QUOTED)
def test_a_value_is_one_word_however_an_override_puts_it_out(form: str, site: Path) -> None:
    for value in HOSTILE:
        write(site, "{% set v = spec.env.V %}\nx=" + form + "\n\nprintf '%s\\0' \"$x\"\n")
        render.__globals__["environment_for"].cache_clear()
        script = render(spec(env={"V": value}), (site,))
        out = subprocess.run(["bash", "-c", script], capture_output=True, check=True, timeout=20).stdout.decode()
        expected = QUOTED[form]
        if expected is None:
            assert out.strip("\0").strip() == value.strip(), "trimming takes nothing but space"
        else:
            assert out == expected.format(value) + "\0"


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_that_would_leave_a_value_unquoted_is_refused(form: str, site: Path) -> None:
    path = write(site, "{% set v = spec.env.V %}\n" + form + "\n")
    assert f"{path}:2: the template cannot be rendered: " in refusal(site, env={"V": "$(id)"})


@pytest.mark.parametrize(
    "form",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(spec) }}",
        "{{ '{x.__class__}'.format_map({'x': spec}) }}",
        "{{ '%s' % spec }}",
        "{{ spec.parse_file('/etc/hostname') }}",
        "{{ spec.parse_raw('', content_type='pickle', allow_pickle=true) }}",
        "{{ spec.model_copy(update={'name': 'x'}).name }}",
        "{{ spec['model_dump']() }}",
        "{{ spec.env.update({'A': 'x'}) }}",
        "{{ spec.env.clear() }}",
        "{% set spec.name = 'x' %}",
        "{{ spec.directives.__func__ }}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum() }}",
        "{{ [1, 2] | random }}",
        "{{ environ }}",
        "{{ now() }}",
        "{{ open('/etc/hostname') }}",
        "{% include '/etc/hostname' %}",
        "{% include '../../secret.j2' %}",
        "{% import 'os' as os %}",
        "{{ spec.directives() | string }}",
        "{{ spec.directives() ~ '' }}",
        "{{ spec.env | raw }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 'a'.ljust(100000000000) }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'job.sbatch.j2' %}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_reaches_only_what_it_is_given_and_ends(form: str, site: Path) -> None:
    (site.parent / "secret.j2").write_text("secret\n")
    path = write(site, f"#!/bin/bash\n{form}\n")
    line = 1 if form.startswith("{% set spec") else 2  # Jinja2 counts an assignment to the statement before it
    assert f"{path}:{line}: the template cannot be rendered: " in refusal(site, env={"A": "1"})


def test_loops_within_loops_end_at_a_deadline(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DEADLINE", 0.3)
    loops = "".join("{% for " + name + " in range(9999) %}" for name in "abcd")
    path = write(site, f"#!/bin/bash\n{loops}{'{% endfor %}' * 4}\n")
    assert f"{path}:2: the template cannot be rendered: takes more than 0.3 s" in refusal(site)
    monkeypatch.undo()
    assert render(spec()), "the next one has its time again"


BROKEN = {
    "an unclosed block": (EXTENDS + "{% block epilogue %}\n", 2, "Unexpected end of template"),
    "a typing error in a block's name": (
        EXTENDS + "\n{% block enviroment %}\n{% endblock %}\n",
        3,
        "the block 'enviroment' overrides nothing; the nearest is 'environment'",
    ),
    "a block like none of ours": (EXTENDS + "{% block xyz %}{% endblock %}\n", 2, "overrides nothing; there are direc"),
    "text outside of all blocks": (EXTENDS + "\n\nexport A=1\n", 4, "stands outside of all blocks, and would be lost"),
    "text before extends": ("#!/bin/bash\n" + EXTENDS, 1, "stands outside of all blocks"),
    "an include outside of all blocks": (EXTENDS + "{% include 'container/none.sh.j2' %}\n", 2, "outside of all blo"),
    "itself as its parent": ('{% extends "job.sbatch.j2" %}\n', 1, "extends itself"),
    "a parent that is not there": ('\n{% extends "nowhere.j2" %}\n', 2, "nowhere.j2"),
    "a parent chosen by a value": ('{% extends "slurmkit/" ~ spec.name %}\n', 1, "extends needs a template's name"),
    "an include that is not there": (EXTENDS + '{% block launch %}\n{% include "no.j2" %}\n{% endblock %}', 3, "no.j2"),
    "an include that is no template": ('#\n{% include "a.sh" %}', 2, "a template's name ends in .j2"),
    "a name that is not there": (
        EXTENDS + "{% block launch %}\n\n{{ nmae }}\n{% endblock %}",
        4,
        "'nmae' is undefined",
    ),
    "super() where nothing is above": ("\n{% block a %}\n{{ super() }}\n{% endblock %}", 3, "no parent block"),
    "the same block twice": (
        EXTENDS + "{% block launch %}{% endblock %}\n{% block launch %}{% endblock %}",
        3,
        "twice",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_override_is_named_with_its_line(what: str, site: Path) -> None:
    text, line, reason = BROKEN[what]
    path = write(site, text)
    (site / "a.sh").touch()
    said = refusal(site)
    assert reason in said
    assert said.startswith(f"{path}:{line}: the template cannot be rendered: ")


def test_two_templates_that_extend_each_other_are_told_so(site: Path) -> None:
    path = write(site, '{% extends "other.j2" %}\n')
    write(site, '{% extends "job.sbatch.j2" %}\n', "other.j2")
    assert f"{path}:1: the template cannot be rendered: extends itself, by way of 'job.sbatch.j2'" in refusal(site)


def test_what_cannot_be_read_as_a_template_is_not_passed_over(site: Path) -> None:
    path = write(site, "")
    path.write_bytes(b"#!/bin/bash\n\n# caf\xe9\n")
    assert f"{path}:3: the template cannot be rendered: not UTF-8" in refusal(site)
    path.unlink()
    path.mkdir()
    assert f"{path}:1: the template cannot be rendered: cannot be read: Is a directory" in refusal(site)
    path.rmdir()
    path.symlink_to(site / "nowhere")
    assert f"{path}:1: the template cannot be rendered: cannot be read: No such file" in refusal(site)


def test_the_digest_of_templates_covers_every_file_that_can_be_rendered(site: Path) -> None:
    def header() -> str:
        for cached in ("environment_for", "digest_of_templates"):
            render.__globals__[cached].cache_clear()
        return next(line for line in render(spec(), (site,)).splitlines() if "templates sha256" in line)

    write(site, EXTENDS + '{% block launch %}{% include "sub/a.j2" %}{{ super() }}{% endblock %}\n')
    other = site.parent / "other"
    other.mkdir()
    (site / "sub").symlink_to(other)
    (other / "a.j2").write_text("# one\n")
    first = header()
    (other / "a.j2").write_text("# two\n")
    assert header() != first
