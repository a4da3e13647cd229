"""The HTML report of a large release in a real Chromium."""

from __future__ import annotations

import os
from pathlib import Path

import browser as browsers
import pytest
from browser import Browser
from made import many_results

from pytest_kld.report.html import write_html_report

pytestmark = pytest.mark.slow
CANDIDATES = 200


def test_a_report_of_200_candidates_opens_and_scrolls(tmp_path: Path) -> None:
    if missing := browsers.missing():
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    results = many_results(CANDIDATES)
    write_html_report(tmp_path / "report.html", results)
    with Browser() as chromium:
        chromium.open(tmp_path / "report.html")
        names = chromium.run(
            "return [...document.querySelectorAll('#summary .candidate bdi')].map(one => one.innerText)"
        )
        assert names == [result.candidate.label for result in results]
        charts = "return [...document.querySelectorAll('[data-chart]')].map(one => one.querySelectorAll('svg').length)"
        assert all(chromium.run(charts))
        chromium.scroll(30)
        assert chromium.run("return scrollY + innerHeight >= document.documentElement.scrollHeight - 1")
        folded = "document.querySelectorAll('#diagnosis > details')"
        assert chromium.run(f"return {folded}.length") == CANDIDATES
        shown = f"return {folded}[199].innerText.includes('the words that come before the label')"
        assert not chromium.run(shown)
        chromium.run(f"{folded}[199].querySelector('summary').click()")
        assert chromium.run(shown)
        assert chromium.complaints() == []
