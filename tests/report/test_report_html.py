"""The HTML report in a real Chromium: drawn, readable, silent, and deaf to what texts in it say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import browser as browsers
import pytest
from browser import Browser
from conftest import SMALL_RUN
from made import error_result, made_matrix, made_mean, made_result, made_speed, subject, with_floor
from selenium.webdriver.common.keys import Keys

from pytest_kld.gate.speed import judge_speed
from pytest_kld.plain import show_token
from pytest_kld.report.html import render, write_html_report
from pytest_kld.report.view import COLOURS

if TYPE_CHECKING:
    from collections.abc import Iterator

CHARTS = ["limits", "histogram", "survival", "quantiles", "text", "windows"]
PHONE = 360


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all tests. Where there is none the tests are skipped; in CI they must not be."""
    if missing := browsers.missing():
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, reference_dir: Path, candidate_dir: Path, broken_dir: Path) -> Path:
    """The directory of a real gate of two candidates in a worker of xdist: report.html and report.json."""
    directory = tmp_path_factory.mktemp("gated")
    (directory / "pytest.ini").write_text("[pytest]\n")
    command = [
        *(sys.executable, "-m", "pytest", "-n1", f"--kld-ref={reference_dir}"),
        *(f"--kld-candidate={model}" for model in (candidate_dir, broken_dir)),
        *(*SMALL_RUN, "--kld-engine=transformers", "--kld-cache-dir=cache", "--kld-max-mean=0.1", "--kld-max-p99=2"),
        *("--kld-html=report.html", "--kld-json=report.json"),
    ]
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert f"HTML report: {directory / 'report.html'}" in run.stdout
    return directory


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (PHONE, False)])
def test_every_chart_is_drawn_without_complaint_or_request(
    chromium: Browser, gated: Path, width: int, dark: bool
) -> None:
    chromium.open(gated / "report.html", width=width, dark=dark)
    assert chromium.run("return [...document.querySelectorAll('[data-chart]')].map(e => e.dataset.chart)") == CHARTS
    for chart in CHARTS:
        for box_width, box_height in boxes(chromium, f"[data-chart={chart}] svg"):
            assert 200 < box_width <= width
            assert box_height > 80
    marks = {
        ("histogram", "line", "path"): 2,
        ("survival", "line", "path"): 2,
        ("quantiles", "dot", "path,circle"): 2 * 6,
        ("text", "line", "path"): 2 * 2,
        ("windows", "rect", "rect"): 2 * 3,
        ("limits", "dot", "path,circle"): 3 * 2,
    }
    for (chart, mark, shapes), count in marks.items():
        drawn = boxes(chromium, *(f"[data-chart={chart}] [aria-label={mark}] {shape}" for shape in shapes.split(",")))
        assert len(drawn) == count, chart
        assert all(max(box) > 0 for box in drawn), chart
    assert not chromium.complaints()
    assert not chromium.requests()
    assert chromium.run("return document.documentElement.scrollWidth") <= width


def boxes(chromium: Browser, *selectors: str) -> list[tuple[float, float]]:
    """Return width and height of each element that is found, in CSS pixels."""
    script = """return [...document.querySelectorAll(arguments[0])].map(element => {
        const box = element.getBoundingClientRect(); return [box.width, box.height]; })"""
    return [tuple(box) for box in chromium.run(script, ", ".join(selectors))]


def test_summary_shows_the_figures_and_verdicts_of_the_json_report(chromium: Browser, gated: Path) -> None:
    results = json.loads((gated / "report.json").read_text())["results"]
    chromium.open(gated / "report.html")
    rows = chromium.run("""return [...document.querySelectorAll('#summary tbody tr')].map(
        row => [...row.children].map(cell => cell.innerText.trim()))""")
    assert rows == [
        [
            result["candidate"],
            {"passed": "✓ pass", "failed": "✗ FAIL"}[result["outcome"]],
            result["band"],
            *(f"{result['figures'][name]:.6f}" for name in ("mean", "median", "p95", "p99", "max")),
            "0",
            f"{result['figures']['top1_agreement']:.2%}",
        ]
        for result in results
    ]
    assert [result["outcome"] for result in results] == ["passed", "failed"]
    protocol = chromium.run("return document.querySelector('#protocol').innerText")
    for value in (results[0]["about"]["protocol"]["token_ids_sha256"], results[0]["about"]["versions"]["torch"]):
        assert value in protocol


def test_every_chart_has_its_numbers_in_a_table(chromium: Browser, gated: Path) -> None:
    chromium.open(gated / "report.html")
    data = chromium.run("return JSON.parse(document.getElementById('chart-data').textContent)")
    counted = chromium.run("""return Object.fromEntries([...document.querySelectorAll('figure')].map(figure => [
        figure.querySelector('[data-chart]').dataset.chart, figure.querySelectorAll('tbody tr').length]))""")
    candidates = data["candidates"]
    bins = {(lower, upper) for one in candidates for lower, upper, _ in one["histogram"]}
    assert counted == {
        "limits": 0,  # its table stands below it, open
        "histogram": len(bins) + 2,
        "survival": sum(len(one["survival"]) for one in candidates),
        "quantiles": 6,
        "text": sum(len(one["text"]) for one in candidates),
        "windows": 3 * 2,
    }
    assert len(boxes(chromium, "#limits tbody tr")) == 5 * 2
    labels = chromium.run("return [...document.querySelectorAll('.chart svg')].map(e => e.getAttribute('aria-label'))")
    assert all(labels)


def test_text_stands_out_from_its_ground_in_light_and_dark_and_paper_is_white(chromium: Browser, gated: Path) -> None:
    grounds = {}
    for media, dark in (("screen", False), ("screen", True), ("print", True)):
        chromium.open(gated / "report.html", dark=dark, media=media)
        ground = colour(chromium, "body", "backgroundColor")
        grounds[media, dark] = luminance(ground)
        for selector in ("body", ".small", "thead th", ".verdict.passed", ".verdict.failed", "figcaption p"):
            assert contrast(colour(chromium, selector, "color"), ground) >= 4.5, (selector, media, dark)
        for number in range(COLOURS):
            assert contrast(parsed(chromium.run(CANDIDATE_COLOUR, number)), ground) >= 3, (number, media, dark)
    assert grounds["screen", False] == grounds["print", True] == 1
    assert grounds["screen", True] < 0.05


CANDIDATE_COLOUR = """const probe = document.body.appendChild(document.createElement('i'));
    probe.className = 'colour-' + arguments[0]; return getComputedStyle(probe).color"""


def colour(chromium: Browser, selector: str, name: str) -> tuple[int, ...]:
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return parsed(chromium.run(script, selector, name))


def parsed(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.removeprefix("rgb(").removesuffix(")").split(","))


def luminance(rgb: tuple[int, ...]) -> float:
    """Return the relative luminance as WCAG 2 defines it."""
    parts = [part / 255 for part in rgb]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return round(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2], 6)


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_report_prints_without_navigation_and_with_its_charts(chromium: Browser, gated: Path) -> None:
    chromium.open(gated / "report.html", media="print")
    assert chromium.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert all(min(box) > 80 for box in boxes(chromium, "[data-chart] svg"))
    pdf = chromium.pdf()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") >= 2


def test_tab_key_reaches_every_chart_and_table_in_reading_order_and_enter_opens_the_numbers(
    chromium: Browser, gated: Path
) -> None:
    chromium.open(gated / "report.html")
    chromium.run("""window.stops = [...document.querySelectorAll('a, summary, [tabindex="0"]')].filter(
        element => element.checkVisibility()); window.focused = [];
        document.addEventListener('focusin', event => window.focused.push(window.stops.indexOf(event.target)))""")
    stops = chromium.run("return window.stops.length")
    for _ in range(stops):
        chromium.press(Keys.TAB)
    assert chromium.run("return window.focused") == list(range(stops))
    assert chromium.run("return window.stops.filter(element => element.tagName === 'FIGURE').length") == len(CHARTS)

    table = "figure:has([data-chart=histogram]) details table"
    assert not chromium.run("return document.querySelector(arguments[0]).checkVisibility()", table)
    chromium.run("document.querySelector('figure:has([data-chart=histogram]) summary').focus()")
    chromium.press(Keys.ENTER)
    assert chromium.run("return document.querySelector(arguments[0]).checkVisibility()", table)


EVIL = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\"><b id=pwned>{{ 7 * 7 }}"


def test_markup_in_texts_is_shown_and_neither_parsed_nor_run(chromium: Browser, tmp_path: Path) -> None:
    result = made_result(subject(f"{EVIL}/one", EVIL), scale=1, reference=subject(EVIL), nodeid=EVIL, message=EVIL)
    about = {**(result.about or {}), EVIL: {EVIL: [EVIL, 1]}}
    about["protocol"] = {**about["protocol"], "dataset": EVIL}
    results = [
        made_result(
            subject(f"{EVIL}/one", EVIL), scale=1, reference=subject(EVIL), nodeid=EVIL, message=EVIL, about=about
        ),
        made_result(subject(f"{EVIL}/two", EVIL), reference=subject(EVIL)),
        error_result(EVIL, message=EVIL, reference=subject(EVIL)),
    ]
    write_html_report(tmp_path / "report.html", results)
    chromium.open(tmp_path / "report.html")
    assert chromium.run("return window.pwned") is None
    assert chromium.run("return document.querySelectorAll('img, b[id]').length") == 0
    assert chromium.run("return document.scripts.length") == 4
    assert chromium.run("return document.body.innerText").count(EVIL) >= 8
    assert len(boxes(chromium, ".chart svg")) == len(CHARTS)
    assert "window.pwned" in chromium.run("return document.querySelector('[data-chart=windows] svg').textContent")
    assert not chromium.complaints()
    assert not chromium.requests()


def test_script_that_is_not_ours_does_not_run_even_as_markup(chromium: Browser, tmp_path: Path) -> None:
    page = render([made_result("a")]).replace("</main>", "<script>window.pwned = 1</script></main>")
    (tmp_path / "report.html").write_text(page)
    chromium.open(tmp_path / "report.html")
    assert chromium.run("return window.pwned") is None
    assert any("Content Security Policy" in line for line in chromium.complaints())


def test_matrix_shows_models_by_backends(chromium: Browser, tmp_path: Path) -> None:
    results = [
        made_result(subject("x", "triton")),
        made_result(subject("x", "cutlass"), scale=0.1),
        error_result(subject("y", "triton")),
    ]
    write_html_report(tmp_path / "report.html", results)
    chromium.open(tmp_path / "report.html")
    rows = chromium.run("""return [...document.querySelectorAll('.matrix tr')].map(
        row => [...row.children].map(cell => cell.innerText))""")
    means = [f"{result.figures['mean']:.6f}" for result in results if result.figures]
    assert rows == [["Model", "triton", "cutlass"], ["x", *means], ["y", "not measured", "not measured"]]


def test_candidates_against_each_other_are_a_matrix_and_a_table_of_pairs(chromium: Browser, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    matrix = made_matrix("x", ("triton", evil, "cutlass"), bound=0.005, gaps={f"x ({evil})": f"because {evil}"})
    write_html_report(tmp_path / "report.html", [made_result("x")], matrices=[matrix])
    chromium.open(tmp_path / "report.html")
    assert chromium.run("return document.querySelector('h1').innerText") == "1 candidate: 1 passed; 1 matrix: 1 failed"
    cells = """return [...document.querySelectorAll('#between table')].map(table => [...table.rows].map(
        row => [...row.cells].map(cell => cell.innerText)))"""
    grid, pairs = chromium.run(cells)
    names = ["triton", evil, "cutlass"]
    means = [["–" if one == other else f"{made_mean(one, other):.4g}" for other in range(3)] for one in range(3)]
    assert grid == [["Row", *names], *([name, *row] for name, row in zip(names, means, strict=True))]
    assert [row[0] for row in pairs[1:]] == [f"triton | {evil}", "triton | cutlass", f"{evil} | cutlass"]
    assert [row[-1] for row in pairs] == ["Verdict", "ok", "FAIL", "ok"]
    heat = chromium.run("""return [...document.querySelectorAll('#between .matrix td')].map(
        cell => cell.style.getPropertyValue('--heat'))""")
    assert heat[0] == ""
    assert max(float(one.rstrip("%")) for one in heat if one) == 100
    assert f"because {evil}" in chromium.run("return document.querySelector('#between').innerText")
    assert not chromium.complaints()


def test_a_report_of_a_matrix_alone_shows_it(chromium: Browser, tmp_path: Path) -> None:
    lost = made_matrix(pairs=(), about=None, outcome="error", message="ModelError: there is nothing to compare")
    write_html_report(tmp_path / "report.html", [], matrices=[lost])
    chromium.open(tmp_path / "report.html")
    assert chromium.run("return document.querySelector('h1').innerText") == "1 matrix: 1 not measured"
    shown = chromium.run("return document.querySelector('#between').innerText")
    assert "ERROR" in shown
    assert "there is nothing to compare" in shown
    assert not chromium.complaints()


def test_intervals_are_drawn_as_whiskers_around_their_figures(chromium: Browser, tmp_path: Path) -> None:
    confident = made_result("a", bounds={"max_mean": 0.05, "max_median": 0.1}, confidence=0.9, size=256)
    write_html_report(tmp_path / "report.html", [confident, made_result("b")])
    chromium.open(tmp_path / "report.html")
    whiskers = [box for box in boxes(chromium, "[data-chart=limits] [aria-label=rule] line") if box[0] > 0]
    finite = [check for check in confident.checks if math.isfinite(check["interval"]["high"])]
    assert len(whiskers) == len(finite) > 0
    low, high = (f"{confident.intervals['mean'][end]:.6f}" for end in ("low", "high"))
    assert f"[{low}, {high}]" in chromium.run("return document.querySelector('#summary table').innerText")
    assert not chromium.complaints()


def test_too_few_windows_for_an_interval_are_named(chromium: Browser, tmp_path: Path) -> None:
    few = made_result("a", bounds={"max_mean": 5}, confidence=0.9)
    assert few.inconclusive
    write_html_report(tmp_path / "report.html", [few])
    chromium.open(tmp_path / "report.html")
    (check,) = few.checks
    shown = chromium.run("return document.querySelector('[aria-label=Limits] tbody').innerText")
    assert f"at least {check['interval']['least_windows']} windows are needed" in shown
    assert "[0, ∞]" in shown
    assert not chromium.complaints()


def test_worst_positions_show_their_label_highlighted_in_its_context(chromium: Browser, tmp_path: Path) -> None:
    top = [{"id": 7, "text": f" {EVIL}", "p": 0.75}, {"id": 8, "text": None, "p": 0.25}]
    position = {
        **{"window": 1, "position": 5, "source_position": 21, "kl": 2.5, "delta_p": -0.5},
        **{"context": f"x < y {EVIL}", "label": 7, "label_text": EVIL, "reference_top": top, "candidate_top": top},
    }
    unknown = {**position, "context": None, "label": None, "label_text": None, "delta_p": None}
    diagnosis = {
        "patterns": [{"name": "a pattern", "explanation": "what it means", "evidence": EVIL}],
        "worst_positions": [position, unknown],
        "worst_windows": [{"window": 1, "start": 16, "mean_kl": 0.5, "max_kl": 2.5}],
        "top1pct_share": 0.25,
        "by_confidence": [{"low": 0.0, "high": 0.1, "positions": 0, "mean_kl": None}],
        "by_position": [{"start": 0, "stop": 2, "mean_kl": 0.5}],
        "by_token_class": [{"class": EVIL, "positions": 3, "mean_kl": 0.5, "share": 0.5}],
        "vocabulary": [{"id": 7, "text": EVIL, "contribution": 0.125}],
    }
    write_html_report(tmp_path / "report.html", [made_result("a", diagnosis=diagnosis)])
    chromium.open(tmp_path / "report.html")
    assert chromium.run("return document.querySelector('.worst mark').innerText") == EVIL
    assert chromium.run("return document.querySelector('.worst .context').innerText") == f"x < y {EVIL}{EVIL}"
    shown = chromium.run("return document.querySelector('#diagnosis').innerText")
    for text in (
        "2.5 nats",
        "window 1, position 5, token 21",
        "−50.00%",
        "75.00%",
        "a pattern",
        show_token(f" {EVIL}"),
    ):
        assert text in shown
    assert chromium.run("return window.pwned") is None
    assert not chromium.complaints()


@pytest.mark.parametrize("results", [[], [error_result("a")]], ids=["nothing gated", "nothing measured"])
def test_report_of_nothing_says_so(chromium: Browser, tmp_path: Path, results: list) -> None:
    write_html_report(tmp_path / "report.html", results)
    chromium.open(tmp_path / "report.html")
    text = chromium.run("return document.body.innerText")
    assert ("the server died" if results else "Nothing was gated") in text
    assert not chromium.complaints()


def test_numbers_that_json_lacks_are_left_out_of_charts_and_shown_in_tables(chromium: Browser, tmp_path: Path) -> None:
    result = made_result("a")
    figures = {**(result.figures or {}), "mean": float("inf"), "max": float("inf"), "infinite_count": 1}
    profile = {**(result.profile or {}), "windows": [[float("inf"), float("inf")], None, [0.0, 0.0], [0.1, 0.2]]}
    write_html_report(tmp_path / "report.html", [made_result("a", figures=figures, profile=profile)])
    chromium.open(tmp_path / "report.html")
    assert len(boxes(chromium, "[data-chart=windows] [aria-label=rect] rect")) == 1
    assert "∞" in chromium.run("return document.querySelector('#summary table').innerText")
    assert not chromium.complaints()


def test_tokens_show_their_spaces_and_control_characters() -> None:
    assert show_token(" the\n\t\x1b\u202e") == "␣the↵\\t\\x1b\\u202e"
    assert show_token("naïve‖") == "naïve‖"


def test_speed_has_tables_its_checks_and_a_chart_against_quality(chromium: Browser, tmp_path: Path) -> None:
    results = []
    for name, scale, tps in (("near", 0.001, 50), ("quick", 0.01, 90), ("poor", 0.1, 40)):
        candidate = made_speed({1: [tps], 4: [3 * tps]})
        checks = judge_speed(
            candidate, {"min_output_tps": {1: 45}}, base=made_speed({1: [45], 4: [99]}), base_label="R", confidence=None
        )
        results.append(made_result(name, scale, speed=checks.to_json()))
    write_html_report(tmp_path / "report.html", results)
    chromium.open(tmp_path / "report.html")
    assert len(boxes(chromium, "[data-chart=speed] [aria-label=dot] path")) == 3 * 2
    data = chromium.run("return JSON.parse(document.getElementById('chart-data').textContent).speed")
    assert [point["short"] for point in data if point["front"] and point["concurrency"] == 4] == ["near", "quick"]
    shown = chromium.run("return document.querySelector('#speed').innerText")
    for text in ("R\t45.0\t99.0", "quick\t90.0\t270.0", "✗ fail poor: output tokens/s at concurrency 1 40 tokens/s <"):
        assert text in shown
    assert not chromium.complaints()


def test_figures_below_twice_the_floor_are_marked_and_every_floor_is_in_a_table(
    chromium: Browser, tmp_path: Path
) -> None:
    results = [with_floor(made_result("clear"), 0.4), with_floor(made_result("drowned"), 0.6), made_result("unknown")]
    write_html_report(tmp_path / "report.html", results)
    chromium.open(tmp_path / "report.html", width=PHONE)
    marks = chromium.run(
        "return [...document.querySelectorAll('.summary tbody tr')].map(row => row.querySelectorAll('abbr').length)"
    )
    assert marks == [0, 5, 0]  # mean, median, P95, P99 and max
    assert chromium.run("return document.querySelector('.summary abbr').title") == "below twice the floor"
    limits = chromium.run("return [...document.querySelectorAll('#limits tbody tr')].map(row => row.innerText)")
    assert [("~" in row) for row in limits if "0.05" in row] == [False, True, False]
    rows = chromium.run("return [...document.querySelectorAll('#floor tbody th')].map(cell => cell.innerText)")
    assert rows == ["reference", "clear", "reference", "drowned"]
    assert "not distinguishable from run-to-run noise" in chromium.run("return document.body.innerText")
    assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
    assert chromium.complaints() == []
    write_html_report(tmp_path / "without.html", [made_result("unknown")])
    chromium.open(tmp_path / "without.html")
    assert not chromium.run("return document.querySelector('#floor, abbr')")
