"""Collect the results of gated tests and write the reports."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.collecting.items import is_gated, is_matrix
from pytest_kld.errors import ReportError
from pytest_kld.plain import LINES, plain
from pytest_kld.settings.config import CONFIG, JOB_SUMMARY

if TYPE_CHECKING:  # imported by what needs them: a session without a gate does not pay for them
    import tempfile
    from collections.abc import Callable, Iterator, Sequence

    from _pytest.terminal import TerminalReporter

    from pytest_kld.collecting.shards import Share
    from pytest_kld.gate.matrix import MatrixResult
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
        self._planned_matrices: dict[str, MatrixResult] = {}
        self._matrices: dict[str, MatrixResult] = {}
        self._ended: str | None = None
        self._incomplete: Incomplete | None = None
        self._share: Share | None = None
        self._written: list[str] = []
        self._complaints: list[str] = []
        self._session: pytest.Session | None = None
        self._plans: tempfile.TemporaryDirectory[str] | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Record what is going to be measured, and this shard's share of it."""
        if self._config.stash[CONFIG].shard is not None and not hasattr(self._config, "workerinput"):
            from pytest_kld.collecting.shards import SHARE

            self._share = self._config.stash.get(SHARE, None)
        if not any(is_gated(item) or is_matrix(item) for item in session.items):
            return
        from pytest_kld.session.plan import matrices_of_plan, plan_of
        from pytest_kld.session.terminating import end_orderly

        self._plan.update((planned.nodeid, planned) for planned in plan_of(session.items))
        self._planned_matrices.update((matrix.nodeid, matrix) for matrix in matrices_of_plan(session.items))
        end_orderly(self._config)

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
        from pytest_kld.session.plan import PLAN_FILE, matrices_of_worker, plan_of_worker, share_of_worker

        plan = plan_of_worker(Path(node.workerinput[PLAN_FILE]), ids, self._config)
        self._plan.update((planned.nodeid, planned) for planned in plan)
        matrices = matrices_of_worker(Path(node.workerinput[PLAN_FILE]))
        self._planned_matrices.update((matrix.nodeid, matrix) for matrix in matrices)
        if plan or matrices:
            from pytest_kld.session.terminating import end_orderly

            end_orderly(self._config)
        shard = self._config.stash[CONFIG].shard
        if shard is not None and (known := share_of_worker(Path(node.workerinput[PLAN_FILE]))) is not None:
            from pytest_kld.collecting.shards import Share

            self._share = Share(shard, *known)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the result of each test; if a test is run again, the last result counts."""
        if report.when in ("call", _CRASH) or (report.when == "setup" and not report.passed):
            self._finished.add(report.nodeid)
        data: dict[str, Any] | None = getattr(report, "kld", None)
        if data is not None:
            from pytest_kld.gate.result import GateResult

            result = GateResult.from_json(data)
            self._by_test[result.nodeid] = result
        elif (data := getattr(report, "kld_matrix", None)) is not None:
            from pytest_kld.gate.matrix import MatrixResult

            self._matrices[report.nodeid] = MatrixResult.from_json(data)
        elif report.when == _CRASH and (lost := self._plan.get(report.nodeid)):
            self._by_test[lost.nodeid] = self._error(lost, report.longreprtext)
        elif report.when == _CRASH and (matrix := self._planned_matrices.get(report.nodeid)):
            self._matrices[matrix.nodeid] = replace(matrix, message=report.longreprtext)

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
        if self._config.option.collectonly or self._config.stash[CONFIG].plan:
            return
        self._session = session
        self._find_missing(session)
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._share is not None and self._share.empty:
            session.exitstatus = pytest.ExitCode.OK
        for name, path, write in self._reports():
            try:
                write(path, self._results(), matrices=self._ordered_matrices())
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
        results, matrices = self._results(), self._ordered_matrices()
        try:
            if results or matrices:
                from pytest_kld.report import terminal
                from pytest_kld.report.matrix import matrix_lines
                from pytest_kld.report.saw import saw_lines

                lines = [*terminal.tables(results), *matrix_lines(matrices)]
                lines += [*saw_lines(results), *terminal.notes(results)]
                missing = terminal.what_is_missing(self._incomplete)
        except Exception as error:  # our own bug, as above
            self._complain(f"cannot show the table: {type(error).__name__}: {error}")
        for complaint in self._complaints:
            terminalreporter.write_line(f"ERROR: {plain(complaint, keep=LINES)}", red=True)
        if not (results or matrices) and self._share is None:
            return
        terminalreporter.section("KLD")
        if self._share is not None:
            terminalreporter.write_line(str(self._share))
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

    def _reports(self) -> Iterator[tuple[str, Path, Callable[..., None]]]:
        """Yield name, path and writer of each requested report."""
        config = self._config.stash[CONFIG]
        if config.junit:
            yield "JUnit", config.junit, partial(_write_junit, shard=config.shard)
        if config.json:
            yield "JSON", config.json, partial(_write_json, incomplete=self._incomplete, shard=config.shard)
        if config.html:
            yield "HTML", config.html, partial(_write_html, incomplete=self._incomplete, shard=config.shard)
        if config.markdown:
            yield "Markdown", config.markdown, partial(_write_markdown, incomplete=self._incomplete, shard=config.shard)
        if (self._by_test or self._matrices) and (summary := os.environ.get(JOB_SUMMARY)):
            yield (
                "job summary",
                Path(summary),
                partial(_append_markdown, incomplete=self._incomplete, shard=config.shard),
            )

    def _find_missing(self, session: pytest.Session) -> None:
        """Record an error for each gated test that was planned but did not finish."""
        missing = [planned for planned in self._plan.values() if planned.nodeid not in self._finished]
        matrices = [matrix for matrix in self._planned_matrices.values() if matrix.nodeid not in self._finished]
        if not missing and not matrices:
            return
        from pytest_kld.gate.result import Incomplete

        reason = self._ended or str(session.shouldfail or session.shouldstop or "it gave no reason")
        self._incomplete = Incomplete(
            reason=reason,
            planned=len(self._plan) + len(self._planned_matrices),
            not_measured=(*(one.nodeid for one in missing), *(one.nodeid for one in matrices)),
        )
        message = f"not measured: the session ended before this test finished ({reason})"
        for planned in missing:
            self._by_test[planned.nodeid] = self._error(planned, message)
        for matrix in matrices:
            self._matrices[matrix.nodeid] = replace(matrix, message=message)

    def _error(self, planned: Planned, message: str) -> GateResult:
        from pytest_kld.gate.result import GateResult

        return GateResult(
            nodeid=planned.nodeid,
            suite=planned.suite,
            reference=planned.reference,
            candidate=planned.candidate,
            outcome="error",
            message=message,
            trust_remote_code=planned.trust_remote_code,
        )

    def _ordered_matrices(self) -> list[MatrixResult]:
        """Return the matrices in the order in which they were collected."""
        planned = list(self._planned_matrices)
        return sorted(
            self._matrices.values(),
            key=lambda one: planned.index(one.nodeid) if one.nodeid in planned else len(planned),
        )

    def _results(self) -> list[GateResult]:
        """Return the results in the order in which candidates were named and tests collected, not of completion."""
        if not self._by_test:
            return []
        names = [model.label for model in self._config.stash[CONFIG].candidate]
        planned = {nodeid: index for index, nodeid in enumerate(self._plan)}

        def rank(result: GateResult) -> tuple[int, int]:
            name = result.candidate.name
            named = names.index(name) if name in names else len(names)
            return named, 0 if result.suite is None else planned.get(result.nodeid, len(planned))

        return sorted(self._by_test.values(), key=rank)


def _write_junit(path: Path, results: Sequence[GateResult], **known: Any) -> None:
    from pytest_kld.report.junit import write_junit

    write_junit(path, results, **known)


def _write_json(path: Path, results: Sequence[GateResult], **known: Any) -> None:
    from pytest_kld.report.json_file import write_json_report

    write_json_report(path, results, **known)


def _write_html(path: Path, results: Sequence[GateResult], **known: Any) -> None:
    from pytest_kld.report.html import write_html_report

    write_html_report(path, results, **known)


def _write_markdown(path: Path, results: Sequence[GateResult], **known: Any) -> None:
    from pytest_kld.report.markdown import write_markdown_report

    write_markdown_report(path, results, **known)


def _append_markdown(path: Path, results: Sequence[GateResult], **known: Any) -> None:
    from pytest_kld.report.markdown import append_markdown_report

    append_markdown_report(path, results, **known)
