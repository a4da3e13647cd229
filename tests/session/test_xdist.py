"""Two workers: captures are made once, and no result is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate

COUNT_RUNS = """
    import os
    import pytest
    from pytest_kld.captures.recording import Recording

    @pytest.fixture(scope="session", autouse=True)
    def count_runs():
        record = Recording.run
        def run(self, *args):
            with open(os.environ["RUNS"], "a") as file:
                file.write(f"{self.subject.label}\\n")
            return record(self, *args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Recording, "run", run)
            yield
"""
"""A conftest that records each capture that is made, in any process."""


def test_workers_share_captures_and_report_every_result(
    gate: Gate, broken_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    gate.pytester.makeconftest(COUNT_RUNS)
    gate.pytester.makepyfile("""
        import os, pytest

        @pytest.mark.kld(max_mean=0.1)
        def test_gate(): pass

        def test_more(kld): assert kld.mean > 0
        def test_crash(kld_candidate, kld):
            if kld.mean > 0.1:
                os._exit(1)
    """)
    candidates = (gate.candidate, broken_dir)
    result = gate(
        "-n2",
        f"--kld-cache-dir={tmp_path / 'cache'}",
        "--kld-json=report.json",
        "--kld-junit=report.xml",
        "--junitxml=out.xml",
        candidates=candidates,
    )
    result.assert_outcomes(passed=4, failed=2)
    result.stdout.no_fnmatch_line("kld: capture*")
    assert sorted((tmp_path / "runs").read_text().split()) == sorted(map(str, (gate.reference, *candidates)))
    assert len(list((tmp_path / "cache" / "scores").glob("*.safetensors"))) == 2

    outcomes = [(r["nodeid"].split("::")[1].split("[")[0], r["candidate"], r["outcome"]) for r in gate.results()]
    assert [candidate for _, candidate, _ in outcomes] == [str(gate.candidate)] * 3 + [str(broken_dir)] * 3
    assert sorted(outcomes) == sorted(
        [
            ("test_gate", str(gate.candidate), "passed"),
            ("test_more", str(gate.candidate), "passed"),
            ("test_crash", str(gate.candidate), "passed"),
            ("test_gate", str(broken_dir), "failed"),
            ("test_more", str(broken_dir), "passed"),
            ("test_crash", str(broken_dir), "error"),
        ]
    )
    result.stdout.re_match_lines([rf"{gate.candidate} .* pass ", rf"{broken_dir} .* ERROR "])
    suites = ElementTree.parse(gate.path / "report.xml").getroot()
    assert [suite.get("errors") for suite in suites] == ["0", "1"]
    cases = [
        case for case in ElementTree.parse(gate.path / "out.xml").getroot().iter("testcase") if case.find("properties")
    ]
    assert len(cases) == 5
    for case in cases:
        assert [item.get("name") for item in case.iter("property")].count("kld_mean") == 1
