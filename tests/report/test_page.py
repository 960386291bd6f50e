"""The page of a run in a headless Chromium: what it shows, how it is used, and that nothing in it runs but its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slurmkit.errors import Failure
from slurmkit.report.page import write_page
from slurmkit.report.samples import read_samples
from tests.support.browser import Browser
from tests.support.report_runs import HOSTILE, episode, facts_of, write_samples, write_steps
from tests.support.requirements import REPOSITORY

# The chip of one curve, as text.
CHIP = "[...document.querySelectorAll('.card')].find((e) => e.querySelector('h3').innerText.startsWith({card}))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps with two conversations, in a folder with a space."""
    run = write_steps(tmp_path_factory.mktemp("some runs") / "first run", 50)
    write_samples(run, 10, episode("<|user|>", "1+2=", "4", "<|end|>", reward=0.0, advantage=-0.5))
    write_samples(run, 50, episode("<|user|>", "1+2=", "3", "\n", "", "漢", "<|end|>"), episode("a", "b", "c"))
    (run / "job.sbatch").write_text("#!/bin/bash\necho '<b>' && true\n")
    values = {
        "spec": {"nodes": 2, "env": {"A": "<i>"}, "comment": None},
        "origins": {"nodes": "job.yaml:3", "env.A": "--set", "comment": "default"},
        "config": {"grpo": {"seed": 7}},
        "config_origins": {"grpo.seed": "train.yaml:9"},
    }
    (run / "settled.json").write_text(json.dumps(values))
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_page([facts_of(run)], run / "report.html")


def chips(browser: Browser, card: str) -> dict[str, str]:
    """The values that stand above a chart, by their labels."""
    found = browser.ask(f"{CHIP.format(card=json.dumps(card))}.querySelector('.chips').innerText")
    return dict(match.groups() for line in found.splitlines() if (match := re.fullmatch(r"(.+?) (\S+)", line)))


def enter(browser: Browser, name: str, value: str, event: str) -> None:
    browser.ask(
        f"(() => {{ const e = document.getElementById({json.dumps(name)}); e.value = {json.dumps(value)}; "
        f"e.dispatchEvent(new Event({json.dumps(event)})); }})()"
    )


def axis(browser: Browser) -> list[float]:
    """The steps from and to which every chart is drawn: one pair, or they do not agree."""
    pairs = browser.ask("[...document.querySelectorAll('.plot')].map((e) => e.dataset.steps)")
    (pair,) = set(pairs)
    return [float(each) for each in pair.split()]


def test_pointing_at_a_chart_tells_every_chart_s_values_at_that_step(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert chips(browser, "Reward")["training, mean"] == "0.8333"  # the last one
    at = browser.place(".card .u-over")
    browser.mouse("mouseMoved", at["x"] + at["width"] * 10 / 50, at["y"] + 50)
    assert chips(browser, "Reward") == {
        "training, mean": "0.5",
        "validation, mean": "0.5",
        "± standard deviation": "0.25",
        "before training": "0.1",
    }
    assert chips(browser, "Time per step") == {"rollout": "2", "update": "1.5", "validation": "0.25", "other": "0.5"}
    assert "step 10" in browser.ask("document.querySelector('.card h3').innerText")
    assert browser.problems == []


def test_dragging_zooms_all_charts_and_a_double_click_shows_all_steps(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert axis(browser) == [0, 50]
    at = browser.place(".card:nth-child(3) .u-over")
    left, y = at["x"], at["y"] + at["height"] / 2
    browser.mouse("mouseMoved", left + at["width"] * 0.2, y)
    browser.mouse("mousePressed", left + at["width"] * 0.2, y)
    browser.mouse("mouseMoved", left + at["width"] * 0.6, y)
    browser.mouse("mouseReleased", left + at["width"] * 0.6, y)
    assert axis(browser) == pytest.approx([10, 30], abs=0.5)
    pressed = "document.querySelector('[data-part=\"1\"]').getAttribute('aria-pressed')"
    assert browser.ask(pressed) == "false"
    for count in (1, 2):
        browser.mouse("mousePressed", left + 50, y, count=count)
        browser.mouse("mouseReleased", left + 50, y, count=count)
    assert axis(browser) == [0, 50]
    assert browser.ask(pressed) == "true"
    browser.click("[data-part='0.5']")
    assert axis(browser) == [25, 50]
    browser.click("#smooth")
    assert axis(browser) == [25, 50]
    assert browser.problems == []


def test_a_curve_can_be_taken_away_and_any_figure_be_drawn(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click(".card:nth-child(2) .chip")
    assert browser.ask("document.querySelector('.card:nth-child(2) .chip').getAttribute('aria-pressed')") == "false"
    enter(browser, "pick", "train:entropy", "change")
    assert browser.ask("document.querySelector('.card:last-child .chip').innerText") == "train:entropy 0.3679"
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_page_follows_the_preferred_color_scheme_and_its_changes(browser: Browser, page: Path, dark: bool) -> None:
    def brightness(of: str) -> float:
        red, green, blue = map(int, re.findall(r"\d+", browser.ask(f"getComputedStyle(document.body).{of}"))[:3])
        return (red + green + blue) / 3

    browser.open(page, dark=dark)
    paper, ink = brightness("backgroundColor"), brightness("color")
    assert (paper < 60 < 180 < ink) if dark else (ink < 60 < 180 < paper)
    before = browser.ask("document.querySelector('.card canvas').toDataURL()")
    browser.prefer("light" if dark else "dark")
    browser.ask("new Promise((done) => setTimeout(done, 100))")
    assert browser.ask("document.querySelector('.card canvas').toDataURL()") != before
    assert browser.problems == []


@pytest.mark.parametrize("width", [320, 400, 800])
def test_nothing_but_tables_scrolls_sideways_on_a_narrow_screen(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert (
        browser.ask("Math.max(...[...document.querySelectorAll('canvas')].map((e) => e.getBoundingClientRect().right))")
        <= width
    )
    assert browser.problems == []


def test_token_shows_training_mask_logprob_and_advantage(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.ask("document.querySelector('.tokens').textContent") == "<|user|>1+2=3↵\n·漢<|end|>"
    at = browser.place(".tokens > span:nth-child(3)")
    browser.mouse("mouseMoved", at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    assert browser.ask("document.getElementById('tip').innerText").splitlines() == [
        '"3"',
        "token 3",
        "logprob -0.5000, probability 0.607",
        "advantage 0.7500",
    ]
    at = browser.place(".tokens > span:nth-child(2)")
    browser.mouse("mouseMoved", at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    assert browser.ask("document.getElementById('tip').innerText").splitlines()[2] == "given: not trained on"

    colours = "[...document.querySelectorAll('.tokens > span')].map((e) => getComputedStyle(e).backgroundColor)"
    found = []
    for name in ("advantage", "logprob", "mask"):
        browser.click(f"[data-shade={name}]")
        given, *_, sampled = browser.ask(colours)
        assert given == "rgba(0, 0, 0, 0)"
        found.append(sampled)
    assert len(set(found)) == 3
    enter(browser, "step", "0", "change")
    assert "reward 0.00" in browser.ask("document.querySelector('.episode summary').innerText")
    assert browser.problems == []


def test_page_shows_how_each_attempt_ended_and_links_to_its_logs(browser: Browser, page: Path) -> None:
    browser.open(page)
    told = browser.ask("document.querySelector('#attempts').innerText")
    assert "node node2: its raylet died (exit code 75)" in told
    links = browser.ask(
        "[...document.querySelectorAll('#attempts a')].map((e) => [e.innerText, e.getAttribute('href')])"
    )
    assert links == [
        ["driver.log", "./attempts/4711.0/driver.log"],
        ["node-node 1.log", "./attempts/4711.0/node-node%201.log"],
    ]
    assert browser.ask("document.querySelector('#script pre').textContent") == "#!/bin/bash\necho '<b>' && true\n"


def test_settings_are_shown_with_their_origin_and_defaults_on_request(browser: Browser, page: Path) -> None:
    rows = (
        "[...document.querySelectorAll('#values tbody tr')].filter((e) => !e.hidden)"
        ".map((e) => [...e.cells].map((cell) => cell.innerText))"
    )
    browser.open(page)
    assert browser.ask(rows) == [
        ["nodes", "2", "job.yaml:3"],
        ["env.A", '"<i>"', "--set"],
        ["grpo.seed", "7", "train.yaml:9"],
    ]
    browser.click("#defaults")
    assert ["comment", "null", "default"] in browser.ask(rows)
    enter(browser, "find", "TRAIN.yaml", "input")
    assert browser.ask(rows) == [["grpo.seed", "7", "train.yaml:9"]]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_models_environments_and_users_write_is_text_and_never_runs(
    browser: Browser, tmp_path: Path, text: str
) -> None:
    run = write_steps(tmp_path / "run", 2)
    write_samples(run, 2, episode("a", text, text, task=text), episode(text, text, task=text))
    (run / "job.sbatch").write_bytes(text.encode(errors="surrogatepass"))
    (run / "settled.json").write_text(json.dumps({"spec": {text: text}, "origins": {text: text}}))
    (run / "metrics.jsonl").open("a").write(json.dumps({"step": 3, text: 1.0, "val:accuracy": 0.5}) + "\n")
    told = facts_of(run)
    (attempt,) = told.attempts
    hostile = replace(attempt, end=text, nodes=text, bad_nodes=[text], name=text)
    page = write_page([replace(told, name=text, reason=text, facts={"job": text}, attempts=[hostile])], run / "r.html")
    browser.open(page)
    browser.ask("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    browser.ask("new Promise((done) => setTimeout(done, 30))")
    assert browser.problems == []
    assert browser.ask("document.title") != "ran"
    assert browser.ask("document.scripts.length") == 3
    assert browser.ask("document.querySelectorAll('img, svg, iframe, object, embed, [onload], [onerror]').length") == 0
    assert browser.ask("[...document.links].every((e) => ['file:', ''].includes(e.protocol))")
    written = {HOSTILE[6]: "]]>⟨U+2028⟩⟨U+2029⟩␀␛[2J", HOSTILE[7]: "⟨U+202E⟩gnirts⟨U+202C⟩", HOSTILE[8]: "?"}
    shown = browser.ask("document.querySelector('#attempts td.bad').textContent")
    assert shown.startswith(written.get(text, text))
    if text != HOSTILE[8]:  # half a character: JSON keeps it, and a browser shows it as one that cannot be shown
        assert written.get(text, text) in browser.ask("document.querySelector('.tokens').textContent")


def test_a_script_that_gets_into_the_page_all_the_same_is_not_run(browser: Browser, page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    cracked = tmp_path / "cracked.html"
    cracked.write_text(text.replace("<main", "<script>document.title = 'ran'</script><main", 1))
    browser.open(cracked)
    assert browser.ask("document.title") != "ran"
    assert "Content Security Policy" in browser.problems[0]


def test_a_page_asks_for_nothing_outside_of_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!\./|#)""", text)
    assert not re.findall(r"@import|url\(", text)
    assert "default-src &#39;none&#39;" in text


def test_chart_library_is_unmodified_and_its_licence_is_in_the_page(page: Path) -> None:
    folder = REPOSITORY / "slurmkit/report/static"
    listed = re.findall(r"^([0-9a-f]{64})  (\S+)$", (folder / "README.md").read_text(), re.MULTILINE)
    assert len(listed) == 3
    for digest, name in listed:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert "Permission is hereby granted, free of charge" in page.read_text()


def test_page_compares_several_runs_and_lists_their_different_settings(
    browser: Browser, run: Path, tmp_path: Path
) -> None:
    other = write_steps(tmp_path / "other", 30, learns=0.5)
    (other / "settled.json").write_text((run / "settled.json").read_text().replace('"seed": 7', '"seed": 8'))
    page = write_page([facts_of(run), facts_of(other)], tmp_path / "compare.html")
    browser.open(page)
    assert chips(browser, "Reward") == {"first run": "0.8333", "other": "0.375"}
    rows = browser.ask("[...document.querySelectorAll('#differences tbody tr')].map((e) => e.innerText)")
    assert rows == ["grpo.seed\t7\t8"]
    assert browser.ask("document.querySelectorAll('#attempts table').length") == 2
    assert browser.problems == []


def test_a_run_that_has_not_begun_has_a_page(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    page = write_page([facts_of(tmp_path / "run", attempts=[], state="queued")], tmp_path / "report.html")
    browser.open(page)
    assert "None has begun." in browser.ask("document.body.innerText")
    assert "run has no settled.json" in browser.ask("document.querySelector('.note').innerText")
    assert browser.problems == []


def test_page_keeps_the_newest_the_first_and_some_middle_steps(tmp_path: Path) -> None:
    for step in range(10, 210, 10):
        write_samples(tmp_path, step, episode("a", "b", "c"))
    kept = read_samples(tmp_path, most_steps=5, most_bytes=10**6)
    assert [each.step for each in kept.steps] == [10, 60, 110, 150, 200]
    assert kept.left_out == ["15 of 20 steps are in the folder samples/ only"]


def test_what_is_too_large_or_broken_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, episode("a", "b", "c"))
    broken = episode("a", "b", "c")
    broken["samples"][0]["mask"].pop()
    write_samples(tmp_path, 2, episode("a", "b", "c"), broken, {"reward": "1", "samples": []}, 7)
    write_samples(tmp_path, 3, episode(*"x" * 5000))
    kept = read_samples(tmp_path, most_steps=5, most_bytes=10_000)
    assert [(each.step, len(each.episodes)) for each in kept.steps] == [(1, 1), (2, 1)]
    assert kept.left_out == [
        "samples/step_3.jsonl is too large for a page (0.1 MB)",
        "samples/step_2.jsonl: 3 lines are not episodes",
    ]


def test_a_page_that_cannot_be_written_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(Failure, match=r"report\.html cannot be written: Is a directory"):
        write_page([facts_of(run)], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
