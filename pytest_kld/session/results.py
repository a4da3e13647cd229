"""What happens to the results of gated tests: they are collected, and written as reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.errors import CacheError
from pytest_kld.gate.result import GateResult
from pytest_kld.report import terminal
from pytest_kld.session.config import CONFIG
from pytest_kld.session.subjects import candidates_of, reference_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from _pytest.terminal import TerminalReporter

_CRASH = "???"
"""What xdist writes for the phase of a test in which its worker died."""


class Results:
    """Collects results where the terminal is (under xdist: in the controller) and writes the reports."""

    def __init__(self, config: pytest.Config) -> None:
        """Begin with none."""
        self._config = config
        self._by_test: dict[str, GateResult] = {}
        self._complaints: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result of each test; of a test that was run again, the last."""
        data: dict[str, Any] | None = getattr(report, "kld", None)
        if data is not None:
            result = GateResult.from_json(data)
            self._by_test[result.nodeid] = result
        elif report.when == _CRASH and (lost := self._lost(report)):
            self._by_test[lost.nodeid] = lost

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report files, also when nothing was gated: an old file must not pass for this session's."""
        if self._config.option.collectonly:
            return
        for write, path in self._files():
            try:
                write(path, self._results())
            except CacheError as error:  # the figures are still worth showing, so the session ends as usual
                self._complaints.append(f"cannot write the report {path}: {error.__cause__}")
                session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        """Print the table."""
        results, config = self._results(), self._config.stash[CONFIG]
        for complaint in self._complaints:
            terminalreporter.write_line(f"ERROR: {complaint}", red=True)
        if not results:
            return
        terminalreporter.section("KLD")
        for line in (*terminal.table(results), *terminal.notes(results)):
            terminalreporter.write_line(line)
        for name, path in (("JUnit", config.junit), ("JSON", config.json), ("HTML", config.html)):
            if path and not self._complaints:
                terminalreporter.write_line(f"{name} report: {path}")

    def _files(self) -> Iterator[tuple[Callable[[Path, Sequence[GateResult]], None], Path]]:
        config = self._config.stash[CONFIG]
        if config.junit:
            from pytest_kld.report.junit import write_junit

            yield write_junit, config.junit
        if config.json:
            from pytest_kld.report.json_file import write_json_report

            yield write_json_report, config.json
        if config.html:
            from pytest_kld.report.html import write_html_report

            yield write_html_report, config.html

    def _lost(self, report: pytest.TestReport) -> GateResult | None:
        """Return the result of a test that took its process with it, if its name tells that it was gated."""
        config = self._config.stash[CONFIG]
        parameters = report.nodeid.partition("[")[2]
        named = [subject for subject in candidates_of(config) if subject.id in parameters]
        if not named:
            return None
        return GateResult(
            nodeid=report.nodeid,
            reference=reference_of(config),
            candidate=max(named, key=lambda subject: len(subject.id)),
            outcome="error",
            message=report.longreprtext,
        )

    def _results(self) -> list[GateResult]:
        """Return the results in the order in which the candidates were named, however workers finished."""
        names = [subject.name for subject in candidates_of(self._config.stash[CONFIG])]

        def rank(result: GateResult) -> int:
            name = result.candidate.name
            return names.index(name) if name in names else len(names)

        return sorted(self._by_test.values(), key=rank)
