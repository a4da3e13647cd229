"""JUnit: the stand-alone report, and the properties in pytest's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
import xmlschema

from pytest_kld.gate.result import GateResult, checks_of
from pytest_kld.gate.verdict import judge
from pytest_kld.report.junit import write_junit
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from conftest import Gate

SCHEMA = xmlschema.XMLSchema(Path(__file__).parents[1] / "data" / "junit-10.xsd")


def validate(path: Path) -> ElementTree.Element:
    SCHEMA.validate(path)
    return ElementTree.parse(path).getroot()


def result(**values: object) -> GateResult:
    defaults = {
        "nodeid": "n",
        "reference": Subject(name="A"),
        "candidate": Subject(name="B"),
        "outcome": "passed",
        "seconds": 1.23456,
    }
    return GateResult(**{**defaults, **values})  # type: ignore[arg-type]


def limit(name: str, figure: str, value: float, bound: float) -> dict[str, object]:
    (check,) = checks_of(judge({figure: value}, {name: bound}))
    return check


def test_report_has_a_suite_per_candidate_and_a_case_per_limit(
    gate: Gate, broken_dir: Path, unloadable_dir: Path
) -> None:
    candidates = (gate.candidate, broken_dir, unloadable_dir)
    gate("--kld-max-mean=0.1", "--kld-junit=report.xml", "--kld-json=report.json", candidates=candidates)
    root = validate(gate.path / "report.xml")
    assert [suite.get("name") for suite in root] == [str(path) for path in candidates]
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("9", "1", "1")
    passed, failed, error = root
    limits = ["max_mean", "max_nan", "max_ref_nan", "max_cut_mass"]
    assert [case.get("name") for case in passed.iter("testcase")] == limits
    assert [len(list(suite.iter("failure"))) for suite in root] == [0, 1, 0]
    assert [len(list(suite.iter("error"))) for suite in root] == [0, 0, 1]
    assert [case.get("name") for case in error.iter("testcase")] == ["measurement"]

    (figures, *_) = (measured["figures"] for measured in gate.results())
    properties = {item.get("name"): item.get("value") for item in passed.iter("property")}
    assert properties["kld_mean"] == str(figures["mean"])
    assert properties["kld_max_mean"] == "0.1"
    (case,) = (case for case in failed.iter("testcase") if case.get("name") == "max_mean")
    assert "max_mean 0.1 (over by" in (case.find("failure").text or "")  # type: ignore[union-attr]
    assert (case.findtext("system-out") or "").splitlines()[-1] == "limit 0.1"


def test_failure_of_the_body_and_of_limits_are_cases_of_their_own(tmp_path: Path) -> None:
    checks = (limit("max_mean", "mean", 0.2, 0.1), limit("max_p99", "p99", 0.2, 0.3))
    write_junit(
        tmp_path / "a.xml", [result(outcome="failed", checks=checks, body_passed=False, message="assert 1 == 2")]
    )
    cases = validate(tmp_path / "a.xml").iter("testcase")
    assert [(case.get("name"), case.find("failure") is not None) for case in cases] == [
        ("max_mean", True),
        ("max_p99", False),
        ("test", True),
    ]


def test_expected_failures_are_skipped_and_errors_stay_errors(tmp_path: Path) -> None:
    checks = (limit("max_mean", "mean", 0.2, 0.1),)
    expected = result(outcome="failed", checks=checks, xfail=True, body_passed=True)
    error = result(outcome="error", candidate=Subject(name="C"), xfail=True, message="CaptureError: gone")
    write_junit(tmp_path / "a.xml", [expected, error])
    first, second = validate(tmp_path / "a.xml")
    assert (first.get("failures"), first.get("skipped"), second.get("errors")) == ("0", "1", "1")


def test_markup_and_control_characters_are_escaped(tmp_path: Path) -> None:
    nasty = "<b>&\"' \x1b[31m\x00 ]]> \ud800 \U0001f642 é"
    check = limit("max_max", "max", math.inf, 1.0)
    failed = result(
        nodeid=nasty,
        candidate=Subject(name=nasty),
        outcome="failed",
        checks=(check,),
        body_passed=False,
        message=f"{nasty}\n{nasty}",
    )
    write_junit(tmp_path / "a.xml", [failed])
    (suite,) = validate(tmp_path / "a.xml")
    spelled = nasty.replace("\x1b", r"\x1b").replace("\x00", r"\x00").replace("\ud800", r"\ud800")
    assert suite.get("name") == spelled
    assert [case.get("classname") for case in suite.iter("testcase")] == [spelled, spelled]
    assert [failure.text for failure in suite.iter("failure")][1] == f"{spelled}\n{spelled}"


@pytest.mark.parametrize("seconds", [0.0, 1e-7, 0.1 + 0.2, 123456.789012])
def test_times_keep_to_the_schema(tmp_path: Path, seconds: float) -> None:
    checks = (limit("max_mean", "mean", 0.0, 0.1),)
    write_junit(tmp_path / "a.xml", [result(checks=checks, seconds=seconds, nodeid=str(n)) for n in range(3)])
    root = validate(tmp_path / "a.xml")
    assert float(root.get("time", "")) == pytest.approx(3 * seconds, abs=0.002)


def test_report_of_nothing_is_valid(tmp_path: Path) -> None:
    write_junit(tmp_path / "a.xml", [])
    assert len(validate(tmp_path / "a.xml")) == 0


@pytest.mark.parametrize("family", ["xunit1", "xunit2"])
def test_pytests_own_report_has_the_figures_and_limits_as_properties(gate: Gate, family: str) -> None:
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld(max_p99=1e-9)\ndef test_gate(): pass")
    gate("--junitxml=out.xml", "-o", f"junit_family={family}", "--kld-json=report.json").assert_outcomes(failed=1)
    (case,) = ElementTree.parse(gate.path / "out.xml").getroot().iter("testcase")
    properties = {item.get("name"): item.get("value") for item in case.iter("property")}
    (measured,) = gate.results()
    for name, value in measured["figures"].items():
        assert properties.get(f"kld_{name}") == (None if value is None else str(value))
    assert (measured["figures"]["js"], measured["figures"]["mean"] > 0) == (None, True)
    assert properties["kld_max_p99"] == "1e-09"
    assert (properties["kld_candidate"], properties["kld_band"]) == (str(gate.candidate), measured["band"])
    assert len(list(case.iter("properties"))) == 1


def test_what_is_not_measured_is_an_error_in_pytests_own_report(gate: Gate, unloadable_dir: Path) -> None:
    gate("--junitxml=out.xml", candidates=(unloadable_dir,)).assert_outcomes(errors=1)
    (case,) = ElementTree.parse(gate.path / "out.xml").getroot().iter("testcase")
    assert case.find("error") is not None
    assert case.find("failure") is None
