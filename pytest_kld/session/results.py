"""Collect the results of gated tests and write the reports."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.errors import ReportError
from pytest_kld.plain import LINES, plain
from pytest_kld.session.config import CONFIG
from pytest_kld.session.fixtures import is_gated

if TYPE_CHECKING:  # imported by what needs them: a session without a gate does not pay for them
    import tempfile
    from collections.abc import Callable, Iterator, Sequence

    from _pytest.terminal import TerminalReporter

    from pytest_kld.gate.result import GateResult, Incomplete
    from pytest_kld.session.plan import Planned, WorkerPlan

_CRASH = "???"
"""The phase that xdist reports for a test whose worker died."""


def make_results(config: pytest.Config) -> Results | WorkerPlan:
    """Return the plugin that collects results; in xdist's workers, the one that passes the plan to the controller."""
    if not hasattr(config, "workerinput"):
        return Results(config)
    from pytest_kld.session.plan import WorkerPlan

    return WorkerPlan()


class Results:
    """Collects results in the process with the terminal (under xdist, the controller) and writes the reports."""

    def __init__(self, config: pytest.Config) -> None:
        """Start without results."""
        self._config = config
        self._plan: dict[str, Planned] = {}
        self._finished: set[str] = set()
        self._by_test: dict[str, GateResult] = {}
        self._ended: str | None = None
        self._incomplete: Incomplete | None = None
        self._written: list[str] = []
        self._complaints: list[str] = []
        self._session: pytest.Session | None = None
        self._plans: tempfile.TemporaryDirectory[str] | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Record what is going to be measured."""
        if not any(is_gated(item) for item in session.items):
            return
        from pytest_kld.session.plan import plan_of

        self._plan.update((planned.nodeid, planned) for planned in plan_of(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of xdist where to write its plan."""
        import tempfile

        from pytest_kld.session.plan import PLAN_FILE

        if self._plans is None:
            self._plans = tempfile.TemporaryDirectory(prefix="pytest-kld-", ignore_cleanup_errors=True)
        node.workerinput[PLAN_FILE] = str(Path(self._plans.name) / f"{node.gateway.id}.json")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Record what a worker collected. All workers collect the same tests."""
        from pytest_kld.session.plan import PLAN_FILE, plan_of_worker

        plan = plan_of_worker(Path(node.workerinput[PLAN_FILE]), ids, self._config)
        self._plan.update((planned.nodeid, planned) for planned in plan)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the result of each test; if a test is run again, the last result counts."""
        if report.when in ("call", _CRASH) or (report.when == "setup" and not report.passed):
            self._finished.add(report.nodeid)
        data: dict[str, Any] | None = getattr(report, "kld", None)
        if data is not None:
            from pytest_kld.gate.result import GateResult

            result = GateResult.from_json(data)
            self._by_test[result.nodeid] = result
        elif report.when == _CRASH and (lost := self._plan.get(report.nodeid)):
            self._by_test[lost.nodeid] = self._error(lost, report.longreprtext)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Record why the session ends: an interrupt, pytest.exit, or pytest's own decision."""
        said = str(getattr(excinfo.value, "msg", excinfo.value))
        self._ended = said or excinfo.typename

    def pytest_internalerror(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Record that an error in pytest or a plugin ends the session."""
        self._ended = f"internal error: {excinfo.typename}"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report files, even if nothing was gated, so that a stale file is not mistaken for this session's.

        A report that cannot be written fails the session, but the other reports and the table are still written.
        """
        if self._plans is not None:
            self._plans.cleanup()
        if self._config.option.collectonly:
            return
        self._session = session
        self._find_missing(session)
        for name, path, write in self._reports():
            try:
                write(path, self._results())
            except ReportError as error:
                self._complain(f"cannot write the {name} report {path}: {error}")
            except Exception as error:  # our own bug, after hours of measuring: still write the rest
                self._complain(f"cannot write the {name} report {path}: {type(error).__name__}: {error}")
            else:
                self._written.append(f"{name} report: {path}")

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        """Print the table, the paths of the reports, and errors in writing them."""
        lines: list[str] = []
        missing: list[str] = []
        results = self._results()
        try:
            if results:
                from pytest_kld.report import terminal

                lines = [
                    *terminal.table(results),
                    *terminal.notes(results),
                ]
                missing = terminal.what_is_missing(self._incomplete)
        except Exception as error:  # our own bug, as above
            self._complain(f"cannot show the table: {type(error).__name__}: {error}")
        for complaint in self._complaints:
            terminalreporter.write_line(f"ERROR: {plain(complaint, keep=LINES)}", red=True)
        if not results:
            return
        terminalreporter.section("KLD")
        for line in lines:
            terminalreporter.write_line(plain(line))
        for line in missing:
            terminalreporter.write_line(plain(line), red=True)
        for line in self._written:
            terminalreporter.write_line(plain(line))

    def _complain(self, complaint: str) -> None:
        """Record what went wrong; a session with a complaint does not succeed."""
        self._complaints.append(complaint)
        if self._session is not None:
            self._session.exitstatus = self._session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def _reports(self) -> Iterator[tuple[str, Path, Callable[[Path, Sequence[GateResult]], None]]]:
        """Yield name, path and writer of each requested report."""
        config = self._config.stash[CONFIG]
        if config.junit:
            yield "JUnit", config.junit, _write_junit
        if config.json:
            yield "JSON", config.json, partial(_write_json, incomplete=self._incomplete)
        if config.html:
            yield "HTML", config.html, partial(_write_html, incomplete=self._incomplete)

    def _find_missing(self, session: pytest.Session) -> None:
        """Record an error for each gated test that was planned but did not finish."""
        missing = [planned for planned in self._plan.values() if planned.nodeid not in self._finished]
        if not missing:
            return
        from pytest_kld.gate.result import Incomplete

        reason = self._ended or str(session.shouldfail or session.shouldstop or "it gave no reason")
        self._incomplete = Incomplete(
            reason=reason, planned=len(self._plan), not_measured=tuple(planned.nodeid for planned in missing)
        )
        for planned in missing:
            message = f"not measured: the session ended before this test finished ({reason})"
            self._by_test[planned.nodeid] = self._error(planned, message)

    def _error(self, planned: Planned, message: str) -> GateResult:
        from pytest_kld.gate.result import GateResult
        from pytest_kld.session.subjects import reference_of

        return GateResult(
            nodeid=planned.nodeid,
            reference=reference_of(self._config.stash[CONFIG]),
            candidate=planned.candidate,
            outcome="error",
            message=message,
        )

    def _results(self) -> list[GateResult]:
        """Return the results in the order in which the candidates were named, not in the order of completion."""
        if not self._by_test:
            return []
        from pytest_kld.session.subjects import candidates_of

        names = [subject.name for subject in candidates_of(self._config.stash[CONFIG])]

        def rank(result: GateResult) -> int:
            name = result.candidate.name
            return names.index(name) if name in names else len(names)

        return sorted(self._by_test.values(), key=rank)


def _write_junit(path: Path, results: Sequence[GateResult]) -> None:
    from pytest_kld.report.junit import write_junit

    write_junit(path, results)


def _write_json(path: Path, results: Sequence[GateResult], incomplete: Incomplete | None) -> None:
    from pytest_kld.report.json_file import write_json_report

    write_json_report(path, results, incomplete)


def _write_html(path: Path, results: Sequence[GateResult], incomplete: Incomplete | None) -> None:
    from pytest_kld.report.html import write_html_report

    write_html_report(path, results, incomplete)
