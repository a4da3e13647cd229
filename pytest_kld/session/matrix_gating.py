"""What happens to the test of a matrix while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_kld.collecting.items import SETUP_SECONDS
from pytest_kld.settings.config import config_of

if TYPE_CHECKING:
    from pytest_kld.gate.matrix import MatrixResult
    from pytest_kld.gate.result import Outcome

_OUTCOMES: dict[str, Outcome] = {"fail": "failed", "pass": "passed", "skip": "skipped"}


def check_matrix(item: pytest.Item) -> None:
    """Fail the test of a matrix if a pair exceeds the limit; if one is undecided, do what --kld-inconclusive says."""
    found = _measured(item)
    if found is None or found.state == "pass":
        return
    outcome = found.undecided if found.state == "inconclusive" else "fail"
    if outcome == "fail":
        pytest.fail(found.explain(), pytrace=False)
    if outcome == "skip":
        pytest.skip(found.explain())


def attach_matrix(item: pytest.Item, report: pytest.TestReport) -> None:
    """Attach the result to the report of the phase that decided it. A matrix that is skipped has none."""
    if report.when == "setup":
        item.stash[SETUP_SECONDS] = report.duration
    if report.when == "teardown" or (report.when == "setup" and report.passed):
        return
    found = _measured(item)
    if report.skipped and found is None:
        return
    result = _result(item, report, found)
    item.user_properties.extend(result.properties())
    report.user_properties = list(item.user_properties)
    report.kld_matrix = result.to_json()  # type: ignore[attr-defined]


def _result(item: pytest.Item, report: pytest.TestReport, found: MatrixResult | None) -> MatrixResult:
    from pytest_kld.collecting.matrix import matrix_of
    from pytest_kld.measuring.comparing import planned_matrix

    seconds = item.stash.get(SETUP_SECONDS, 0.0) + (report.duration if report.when == "call" else 0.0)
    if found is None or report.when != "call":
        matrix = matrix_of(item)
        assert matrix is not None
        return replace(
            planned_matrix(matrix, item.nodeid, config_of(item)), message=report.longreprtext, seconds=seconds
        )
    outcome: Outcome = "passed"
    if found.state == "fail":
        outcome = "failed"
    elif found.state == "inconclusive":
        outcome = _OUTCOMES[found.undecided]
    message = "" if outcome == "passed" else found.explain()
    return replace(found, nodeid=item.nodeid, outcome=outcome, message=message, seconds=seconds)


def _measured(item: pytest.Item) -> MatrixResult | None:
    found: MatrixResult | None = getattr(item, "funcargs", {}).get("_kld_matrix")
    return found
