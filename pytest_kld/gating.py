"""What happens to a gated test as it runs, and to its result afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.config import CONFIG
from pytest_kld.fixtures import KLD, candidate_label, reference_label
from pytest_kld.gate import Verdict
from pytest_kld.report import terminal
from pytest_kld.result import GateResult, Outcome, checks_of

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

_SETUP_SECONDS = pytest.StashKey[float]()


def check_limits(item: pytest.Item) -> None:
    """Fail the test if a figure is over its limit. Does nothing for tests that are not gated."""
    kld = _kld_of(item)
    if kld is not None and not (verdict := kld.verdict()).passed:
        pytest.fail(explain(kld, verdict), pytrace=False)


def explain(kld: KLD, verdict: Verdict) -> str:
    """Return the words of a verdict."""
    return verdict.explain(kld.candidate, kld.reference, kld.summary.to_json())


def attach_result(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put the result on the report of the phase that decided it, where reports and xdist find it."""
    if report.when == "setup":
        item.stash[_SETUP_SECONDS] = report.duration
    kld = _kld_of(item)
    if kld is None and not (report.when == "setup" and report.failed):
        return
    if report.when == "teardown" or (report.when == "setup" and kld is not None):
        return
    result = _result(item, report, kld)
    item.user_properties.extend(result.properties())
    report.user_properties = list(item.user_properties)
    report.kld = result.to_json()  # type: ignore[attr-defined]
    if kld is not None and report.failed and kld.verdict().passed is False and not _is_verdict(report):
        report.sections.append(("kld", explain(kld, kld.verdict())))


def _result(item: pytest.Item, report: pytest.TestReport, kld: KLD | None) -> GateResult:
    config = item.config.stash[CONFIG]
    verdict = kld.verdict() if kld else None
    outcome: Outcome = "passed"
    if kld is None:
        outcome = "error"
    elif report.failed or (verdict and not verdict.passed):
        outcome = "failed"
    return GateResult(
        nodeid=item.nodeid,
        reference=reference_label(config),
        candidate=candidate_label(item),
        outcome=outcome,
        message="" if outcome == "passed" else report.longreprtext,
        figures=kld.summary.to_json() if kld else None,
        datasets={name: summary.to_json() for name, summary in kld.datasets.items()} if kld else {},
        checks=checks_of(verdict) if verdict else (),
        about=kld.scores.about if kld else None,
        seconds=item.stash.get(_SETUP_SECONDS, 0.0) + (report.duration if report.when == "call" else 0.0),
    )


class Results:
    """Collects results where the terminal is (under xdist: in the controller) and writes the reports."""

    def __init__(self, config: pytest.Config) -> None:
        """Begin with none."""
        self._config = config
        self._by_test: dict[str, GateResult] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result of each test; of a test that was run again, the last."""
        data: dict[str, Any] | None = getattr(report, "kld", None)
        if data is not None:
            result = GateResult.from_json(data)
            self._by_test[result.nodeid] = result

    def pytest_sessionfinish(self) -> None:
        """Write the report files, also when nothing was gated: an old file must not pass for this session's."""
        config, results = self._config.stash[CONFIG], list(self._by_test.values())
        if config.junit:
            from pytest_kld.report.junit import write_junit

            write_junit(config.junit, results)
        if config.json:
            from pytest_kld.report.json_file import write_json_report

            write_json_report(config.json, results)

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        """Print the table."""
        results, config = list(self._by_test.values()), self._config.stash[CONFIG]
        if not results:
            return
        terminalreporter.section("KLD")
        for line in terminal.table(results):
            terminalreporter.write_line(line)
        for name, path in (("JUnit", config.junit), ("JSON", config.json)):
            if path:
                terminalreporter.write_line(f"{name} report: {path}")


def _kld_of(item: pytest.Item) -> KLD | None:
    kld = getattr(item, "funcargs", {}).get("kld")
    return kld if isinstance(kld, KLD) else None


def _is_verdict(report: pytest.TestReport) -> bool:
    return "KLD limits exceeded" in report.longreprtext
