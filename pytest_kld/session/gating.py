"""What happens to a gated test while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.session.config import CONFIG
from pytest_kld.session.fixtures import GATE, bounds_of

if TYPE_CHECKING:  # imported by what needs them: a session without a gate does not pay for them
    from pytest_kld.gate.result import GateResult, Outcome
    from pytest_kld.gate.verdict import Verdict
    from pytest_kld.session.kld import KLD

_SETUP_SECONDS = pytest.StashKey[float]()
_BODY_PASSED = pytest.StashKey[bool]()
"""Set when the limits decide a test's outcome, so that it is not mistaken for a failure or a skip of the body."""

_OUTCOMES: dict[str, Outcome] = {"fail": "failed", "pass": "passed", "skip": "skipped"}


def check_limits(item: pytest.Item) -> None:
    """Fail the test if a figure is outside its limit; if a limit is undecided, do what --kld-inconclusive says.

    Does nothing for tests that are not gated, but fails a test that gained a marker while it ran: its limits must not
    go unchecked.
    """
    kld = _kld_of(item)
    if kld is None:
        if item.get_closest_marker("kld"):
            pytest.fail(
                f"{item.nodeid} has a kld marker, but nothing was measured, so its limits were not checked. "
                "Set the marker before the test runs, or use the kld fixture.",
                pytrace=False,
            )
        return
    if bounds_of(item, item.config.stash[CONFIG]) != item.stash[GATE].bounds:
        pytest.fail(
            f"{item.nodeid}: its kld markers changed after its figures were computed, so the new limits were not "
            "checked. Set markers before the kld fixture is used.",
            pytrace=False,
        )
    if (verdict := kld.verdict()).passed:
        return
    item.stash[_BODY_PASSED] = True
    outcome = item.config.stash[CONFIG].inconclusive if verdict.state == "inconclusive" else "fail"
    if outcome == "fail":
        pytest.fail(explain(kld, verdict), pytrace=False)
    if outcome == "skip":
        pytest.skip(explain(kld, verdict))


def explain(kld: KLD, verdict: Verdict) -> str:
    """Return the explanation of a verdict."""
    return verdict.explain(kld.candidate, kld.reference, kld.summary.to_json())


def attach_result(item: pytest.Item, report: pytest.TestReport) -> None:
    """Attach the result to the report of the phase that decided it, so that reports and xdist find it.

    A test that is skipped is not gated and has no result. A test that is expected to fail has one: it was measured.
    """
    if report.when == "setup":
        item.stash[_SETUP_SECONDS] = report.duration
    if report.when == "teardown" or (report.when == "setup" and report.passed):
        return
    if report.skipped and not hasattr(report, "wasxfail") and not item.stash.get(_BODY_PASSED, False):
        return
    kld = _kld_of(item)
    result = _result(item, report, kld)
    item.user_properties[:] = [pair for pair in item.user_properties if not pair[0].startswith("kld_")]
    item.user_properties.extend(result.properties())
    report.user_properties = list(item.user_properties)
    report.kld = result.to_json()  # type: ignore[attr-defined]
    if kld is not None and result.body_passed is False and not (verdict := kld.verdict()).passed:
        report.sections.append(("kld", explain(kld, verdict)))
    if result.outcome == "failed" and result.diagnosis:
        from pytest_kld.report.diagnosis import diagnosis_lines

        report.sections.append(("kld diagnosis", "\n".join(diagnosis_lines(result.diagnosis))))


def _result(item: pytest.Item, report: pytest.TestReport, kld: KLD | None) -> GateResult:
    from pytest_kld.gate.result import GateResult, checks_of
    from pytest_kld.session.subjects import candidate_of, reference_of

    config = item.config.stash[CONFIG]
    verdict = kld.verdict() if kld else None
    called, xfail = report.when == "call", hasattr(report, "wasxfail")
    body_passed = (report.passed or item.stash.get(_BODY_PASSED, False)) if called else None
    outcome: Outcome = "passed"
    if kld is None or not called:
        outcome = "error"
    elif not body_passed or (verdict and verdict.state == "fail"):
        outcome = "failed"
    elif verdict and verdict.state == "inconclusive":
        outcome = _OUTCOMES[config.inconclusive]
    return GateResult(
        nodeid=item.nodeid,
        reference=kld.subjects["reference"] if kld else reference_of(config),
        candidate=kld.subjects["candidate"] if kld else candidate_of(item),
        outcome=outcome,
        xfail=xfail,
        message="" if outcome == "passed" else report.longreprtext,
        body_passed=body_passed,
        figures=kld.summary.to_json() if kld else None,
        datasets={name: summary.to_json() for name, summary in kld.datasets.items()} if kld else {},
        intervals={name: interval.to_json() for name, interval in kld.intervals.items()} if kld else {},
        checks=checks_of(verdict) if verdict else (),
        undecided=config.inconclusive,
        about=kld.scores.about if kld else None,
        diagnosis=dict(kld.diagnosis) if kld and kld.diagnosis else None,
        seconds=item.stash.get(_SETUP_SECONDS, 0.0) + (report.duration if called else 0.0),
        profile=_profile(kld) if kld and config.html else None,
    )


def _kld_of(item: pytest.Item) -> KLD | None:
    gate = item.stash.get(GATE, None)
    return gate.kld if gate else None


def _profile(kld: KLD) -> dict[str, Any]:
    from pytest_kld.figures.profile import profile_of

    return profile_of(kld.scores)
