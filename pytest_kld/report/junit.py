"""The stand-alone JUnit report: a suite per candidate, a case per limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from junitparser import Error, Failure, JUnitXml, Properties, Property, TestCase, TestSuite

from pytest_kld.files import write_atomically
from pytest_kld.gate import LIMITS, Check
from pytest_kld.result import GateResult, by_candidate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def write_junit(path: Path, results: Sequence[GateResult]) -> None:
    """Write the report. A limit that holds is a case that passed; what was not measured is an error."""
    report = JUnitXml(name="pytest-kld")
    for candidate, group in by_candidate(results).items():
        report.add_testsuite(_suite(candidate, group))
    report.update_statistics()
    write_atomically(path, report.tostring())


def _suite(candidate: str, group: Sequence[GateResult]) -> TestSuite:
    suite = TestSuite(candidate)
    for name, value in group[0].properties():
        suite.add_property(name, str(value))
    for result in group:
        for case in _cases(result):
            suite.add_testcase(case)
    return suite


def _cases(result: GateResult) -> list[TestCase]:
    cases = []
    for data in result.checks:
        dataset = data["dataset"]
        check = Check(limit=LIMITS[data["limit"]], value=data["value"], bound=data["bound"], dataset=dataset)
        case = TestCase(
            name=f"{data['limit']}[{dataset}]" if dataset else data["limit"], classname=result.nodeid, time=0
        )
        properties = Properties()
        properties.add_property(Property("value", str(check.value)))
        properties.add_property(Property("limit", str(check.bound)))
        case.append(properties)
        if not check.passed:
            case.result = [_told(Failure, str(check), "limit exceeded")]
        cases.append(case)
    within = all(data["passed"] for data in result.checks)
    if result.outcome == "error" or (result.outcome == "failed" and within):
        case = TestCase(name="measurement" if result.outcome == "error" else "test", classname=result.nodeid, time=0)
        kind = Error if result.outcome == "error" else Failure
        case.result = [_told(kind, result.message, "not measured" if kind is Error else "assertion")]
        cases.append(case)
    if cases:
        cases[0].time = result.seconds
    return cases


def _told(kind: type[Error] | type[Failure], message: str, category: str) -> Error | Failure:
    told = kind(message.splitlines()[0] if message else category, category)
    told.text = message
    return told
