"""What the pages name is there: keys, metrics, files, other pages; and mkdocs makes a site of them."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from slurmkit.config.schema import TrainConfig
from slurmkit.config.section import ValidationError
from slurmkit.job.reference import pages
from slurmkit.job.site import SiteFile
from slurmkit.job.spec import JobSpec
from tests.support.documentation import PAGES, TEXTS, spans, yaml_blocks
from tests.support.requirements import REPOSITORY, missing

_SECTIONS = ("grpo", "loss_fn", "checkpointing", "policy", "data", "env", "logger", "cluster")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# Keys of NeMo RL that slurmkit has no place for: the table of docs/environments.md that says so.
_THEIRS = re.compile(r"\| there \| here \|\n(?:\|.*\n)+")
# What a file of a kind may hold besides.
_BESIDE = {
    TrainConfig: ("defaults",),
    JobSpec: ("overrides", "results_dir", "profile", "profiles", "templates"),
    SiteFile: (),
}


@cache
def keys() -> set[str]:
    """Every dotted key of a configuration, and every section."""
    found, prefix = set(), ""
    for line in pages()["configuration.md"].splitlines():
        if line.startswith("## "):
            prefix = line[3:]
            found.add(prefix)
        elif row := re.match(r"\| `(\w+)` \|", line):
            found.add(f"{prefix}.{row[1]}")
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_every_key_that_a_page_names_is_a_key(page: str) -> None:
    known = keys()
    text = _THEIRS.sub("", TEXTS[page])
    named = set(re.findall(rf"`((?:{'|'.join(_SECTIONS)})(?:\.[a-z_0-9*]+)+)(?=[`=\s])", text))
    unknown = {key for key in named if not fnmatch.filter(known, key) and not key.endswith((".yaml", ".py"))}
    # data.train may be a list, and stands for both; a mapping's keys are its own.
    unknown = {key for key in unknown if not re.match(r"data\.\*|policy\.generation\.vllm_kwargs\.", key)}
    assert not unknown


@pytest.mark.parametrize("page", [page for page in TEXTS if any(yaml_blocks(page))])
def test_yaml_files_on_pages_have_only_known_keys_and_valid_types(page: str) -> None:
    for block in yaml_blocks(page):
        data = yaml.safe_load(block)
        kinds = [
            kind for kind in (TrainConfig, JobSpec, SiteFile) if data.keys() <= {*kind.model_fields, *_BESIDE[kind]}
        ]
        assert kinds, f"no file has all of {', '.join(data)}"
        given = {key: value for key, value in data.items() if key in kinds[0].model_fields}
        with pytest.raises(ValidationError) if kinds[0] is not SiteFile else nullcontext() as refused:
            kinds[0].model_validate(given)  # a whole file has more than a page shows of it
        problems = [] if refused is None else refused.value.problems
        assert [problem for problem in problems if problem.kind in ("unknown", "type")] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_metric_that_a_page_names_is_in_the_table_of_metrics(page: str) -> None:
    table = set(re.findall(r"^\| `([a-z]+:[^`]+)`", TEXTS["docs/metrics.md"], re.MULTILINE))
    assert len(table) > 60
    patterns = [re.sub(r"<\w+>|\bk\b", "*", name) for name in table]
    named = {span for span in spans(page) if re.fullmatch(r"(train|val|perf|time):[a-z_@/0-9]+", span)}
    assert not {name for name in named if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_to_a_file_of_the_repository(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in _LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


def test_every_docs_page_is_in_the_navigation_and_in_an_index() -> None:
    index = TEXTS["README.md"] + TEXTS["docs/index.md"]
    nav = (REPOSITORY / "mkdocs.yml").read_text()
    for page in PAGES:
        name = str(page.relative_to(REPOSITORY / "docs")) if page.parent != REPOSITORY else None
        if name is not None:
            assert name in nav, f"mkdocs.yml has no place for {name}"
            assert name == "index.md" or name in index or name in TEXTS["docs/containers/index.md"] or "/" in name, name


def test_the_architecture_page_lists_every_package_and_only_existing_files() -> None:
    rows = dict(re.findall(r"^\| `slurmkit/(\w+)/` \| (.+) \|$", TEXTS["docs/architecture.md"], re.MULTILINE))
    last = re.findall(r"^\| \| (.+) \|$", TEXTS["docs/architecture.md"], re.MULTILINE)
    rooms = {path.parent.name for path in (REPOSITORY / "slurmkit").glob("*/__init__.py")}
    assert rooms == set(rows)
    for room, text in rows.items():
        there = {path.name for path in (REPOSITORY / "slurmkit" / room).rglob("*")}
        there |= {name.partition(".")[0] for name in there} | {f"{name}/" for name in there}
        for name in re.findall(r"`([\w./]+)`", text + (" ".join(last) if room == "job" else "")):
            is_there = name in there or (REPOSITORY / "slurmkit" / name).exists()
            assert is_there or name in ("slurmkit bench", "JobSpec"), f"{room} has no {name}"


def test_mkdocs_builds_the_site_without_a_warning(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None:
        missing("mkdocs is not installed (scripts/test installs it)")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Everything random follows from it" in (tmp_path / "configuration/index.html").read_text()
    used = [path for path in tmp_path.rglob("*.html") if re.search(r'<(script|link)[^>]+"https?://', path.read_text())]
    assert [path for path in used if "canonical" not in path.read_text()] == [], "the site needs nothing from elsewhere"
