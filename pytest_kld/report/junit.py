"""The stand-alone JUnit report: a suite per candidate, a case per limit.

It follows the schema of Jenkins' xUnit plugin, which allows properties for suites but not for cases; the figures of a
case are in its system-out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from pytest_kld.figures.interval import Interval
from pytest_kld.files import write_report
from pytest_kld.gate.limits import LIMITS
from pytest_kld.gate.result import GateResult, by_candidate
from pytest_kld.gate.verdict import Check
from pytest_kld.plain import LINES, plain

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def write_junit(path: Path, results: Sequence[GateResult]) -> None:
    """Write the report. A limit that holds is a passed case; a test that was not measured is an error.

    Raises:
        ReportError: the file cannot be written.

    """
    report = JUnitXml(name="pytest-kld")
    for candidate, group in by_candidate(results).items():
        report.add_testsuite(_suite(candidate, group))
    _total(report)
    write_report(path, report.tostring())


def _total(report: JUnitXml) -> None:
    """Write the totals without `update_statistics`: the schema allows three decimals, and `skipped` only for suites."""
    for suite in report:
        suite.update_statistics()
        suite.time = round(suite.time, 3)
    for name in ("tests", "failures", "errors"):
        setattr(report, name, sum(getattr(suite, name) for suite in report))
    report.time = round(sum(suite.time for suite in report), 3)


def _suite(candidate: str, group: Sequence[GateResult]) -> TestSuite:
    suite = TestSuite(plain(candidate))
    measured = next((result for result in group if result.figures), group[0])
    for name, value in measured.properties():
        suite.add_property(name, plain(str(value)))
    for result in group:
        for case in _cases(result):
            suite.add_testcase(case)
    return suite


def _cases(result: GateResult) -> list[TestCase]:
    cases = [_limit_case(result, data) for data in result.checks]
    if result.outcome == "error":
        cases.append(_case(result, "measurement", Error, "not measured", result.message))
    elif result.body_passed is False:
        cases.append(_case(result, "test", Failure, "assertion", result.message))
    if cases:
        cases[0].time = round(result.seconds, 3)
    return cases


def _limit_case(result: GateResult, data: dict[str, Any]) -> TestCase:
    dataset = data["dataset"]
    check = Check(
        limit=LIMITS[data["limit"]],
        value=data["value"],
        bound=data["bound"],
        dataset=dataset,
        interval=None if data["interval"] is None else Interval(**data["interval"]),
        windows=result.windows_of(dataset),
    )
    name = f"{data['limit']}[{dataset}]" if dataset else data["limit"]
    if check.state == "inconclusive":
        kind = {"fail": Failure, "skip": Skipped, "pass": None}[result.undecided]
        case = _case(result, plain(name), kind, "limit undecided", str(check))
    else:
        case = _case(result, plain(name), None if check.passed else Failure, "limit exceeded", str(check))
    interval = {} if check.interval is None else check.interval.to_json()
    figures = {"value": check.value, "limit": check.bound, **interval}
    known = (f"{name} {figure}" for name, figure in figures.items() if figure is not None)
    case.system_out = "\n".join([plain(str(check)), *known])
    return case


def _case(
    result: GateResult, name: str, kind: type[Error | Failure | Skipped] | None, category: str, message: str
) -> TestCase:
    case = TestCase(name=name, classname=plain(result.nodeid), time=0)
    if kind is None:
        return case
    headline = plain(message.partition("\n")[0] or category)
    if result.xfail and kind is Failure:
        told: Error | Failure | Skipped = Skipped(headline, "expected failure")
    else:
        told = kind(headline, category)
    told.text = plain(message, keep=LINES)
    case.result = [told]
    return case
