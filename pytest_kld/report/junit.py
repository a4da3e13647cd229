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
from pytest_kld.gate.result import GateResult, Shard, by_candidate
from pytest_kld.gate.verdict import Check
from pytest_kld.plain import LINES, plain

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_kld.gate.matrix import MatrixResult

_UNDECIDED = {"fail": Failure, "skip": Skipped, "pass": None}
"""What an undecided limit is in JUnit, by --kld-inconclusive."""


def write_junit(
    path: Path,
    results: Sequence[GateResult],
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> None:
    """Write the report. A limit that holds is a passed case; a test that was not measured is an error.

    Each matrix is a suite, with a case for each pair that has a limit.

    Raises:
        ReportError: the file cannot be written.

    """
    write_report(path, junit_report(results, shard, matrices))


def junit_report(
    results: Sequence[GateResult], shard: Shard | None = None, matrices: Sequence[MatrixResult] = ()
) -> bytes:
    """Return the report as XML."""
    report = JUnitXml(name="pytest-kld" if shard is None else f"pytest-kld, {shard}")
    for candidate, group in by_candidate(results).items():
        report.add_testsuite(_suite(candidate, group))
    for matrix in matrices:
        report.add_testsuite(_matrix_suite(matrix))
    _total(report)
    return bytes(report.tostring())


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
    cases += [_change_case(result, change) for change in result.changes if change["allowed"] is not None]
    cases += [_speed_case(result, data) for data in (result.speed or {}).get("checks", ())]
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
        floor=data["floor"],
    )
    name = f"{data['limit']}[{dataset}]" if dataset else data["limit"]
    if check.state == "inconclusive":
        case = _case(result, plain(name), _UNDECIDED[result.undecided], "limit undecided", str(check))
    else:
        case = _case(result, plain(name), None if check.passed else Failure, "limit exceeded", str(check))
    interval = {} if check.interval is None else check.interval.to_json()
    figures = {"value": check.value, "limit": check.bound, "floor": check.floor, **interval}
    known = (f"{name} {figure}" for name, figure in figures.items() if figure is not None)
    case.system_out = "\n".join([plain(str(check)), *known])
    return case


def _change_case(result: GateResult, change: dict[str, Any]) -> TestCase:
    kind = {"pass": None, "fail": Failure, "inconclusive": _UNDECIDED[result.undecided]}[change["state"]]
    category = "limit undecided" if change["state"] == "inconclusive" else "regression"
    name = f"max_regression[{change['allowed'].partition(':')[0]}]"
    case = _case(result, plain(name), kind, category, change["text"])
    interval = change["interval"] or {}
    figures = {name: change[name] for name in ("value", "floor")}
    figures |= {"baseline": change["before"], "limit": change["bound"], **interval}
    known = (f"{name} {figure}" for name, figure in figures.items() if figure is not None)
    case.system_out = "\n".join([plain(change["text"]), *known])
    return case


def _speed_case(result: GateResult, data: dict[str, Any]) -> TestCase:
    name = f"{data['limit']}[C={data['concurrency']}]"
    if data["state"] == "inconclusive":
        kind, category = _UNDECIDED[result.undecided], "limit undecided"
    else:
        kind, category = (None if data["state"] == "pass" else Failure), "limit exceeded"
    case = _case(result, name, kind, category, data["text"])
    case.system_out = "\n".join(
        [plain(data["text"]), f"{name} value {data['value']:g}", f"{name} limit {data['bound']:g}"]
    )
    return case


def _matrix_suite(matrix: MatrixResult) -> TestSuite:
    suite = TestSuite(plain(f"matrix of {matrix.title}"))
    for name, value in matrix.properties():
        suite.add_property(name, plain(str(value)))
    cases = [_pair_case(matrix, pair, check) for pair in matrix.pairs for check in pair["checks"]]
    if matrix.outcome == "error":
        cases.append(_case(matrix, "matrix", Error, "not measured", matrix.message))
    elif not cases:
        cases.append(_case(matrix, "matrix", None, "", ""))
    cases[0].time = round(matrix.seconds, 3)
    for case in cases:
        suite.add_testcase(case)
    return suite


def _pair_case(matrix: MatrixResult, pair: dict[str, Any], check: dict[str, Any]) -> TestCase:
    of = " | ".join(matrix.short(pair[side]) for side in ("first", "second"))
    name = f"{check['limit']}[{of}]" + (f"[{check['dataset']}]" if check["dataset"] else "")
    kind = {"pass": None, "fail": Failure, "inconclusive": _UNDECIDED[matrix.undecided]}[check["state"]]
    category = "limit undecided" if check["state"] == "inconclusive" else "limit exceeded"
    case = _case(matrix, plain(name), kind, category, check["text"])
    figures = {"value": check["value"], "limit": check["bound"], "floor": check["floor"], **(check["interval"] or {})}
    known = (plain(f"{name} {figure} {value}") for figure, value in figures.items() if value is not None)
    case.system_out = "\n".join([plain(check["text"]), *known])
    return case


def _case(
    result: GateResult | MatrixResult,
    name: str,
    kind: type[Error | Failure | Skipped] | None,
    category: str,
    message: str,
) -> TestCase:
    case = TestCase(name=name, classname=plain(result.nodeid), time=0)
    if kind is None:
        return case
    headline = plain(message.partition("\n")[0] or category)
    if kind is Failure and isinstance(result, GateResult) and result.xfail:
        told: Error | Failure | Skipped = Skipped(headline, "expected failure")
    else:
        told = kind(headline, category)
    told.text = plain(message, keep=LINES)
    case.result = [told]
    return case
