"""What happens to a gated test while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_kld.collecting.items import FLOOR, GATE, SETUP_SECONDS, Gate, bounds_of, is_gated
from pytest_kld.plain import LINES, plain
from pytest_kld.settings.config import config_of

if TYPE_CHECKING:  # imported by what needs them: a session without a gate does not pay for them
    from pytest_kld.collecting.kld import KLD
    from pytest_kld.gate.result import GateResult, Outcome
    from pytest_kld.gate.verdict import State

_BODY_PASSED = pytest.StashKey[bool]()
"""Set when the limits decide a test's outcome, so that it is not mistaken for a failure or a skip of the body."""

_OUTCOMES: dict[str, Outcome] = {"fail": "failed", "pass": "passed", "skip": "skipped"}


def require_baseline(item: pytest.Item) -> None:
    """Fail the setup of a test whose change cannot be checked, because no baseline can be read: before a model runs."""
    config = config_of(item)
    if config.baseline is None or not is_gated(item):
        return
    from pytest_kld.errors import BaselineError
    from pytest_kld.gate.baseline import find_baseline, no_baseline
    from pytest_kld.settings.subjects import candidate_of

    candidate = candidate_of(item).label
    try:
        found = find_baseline(config.baseline, candidate)
        if found is None and config.max_regression:
            raise BaselineError(no_baseline(config.baseline, candidate))
    except BaselineError as error:
        pytest.fail(f"BaselineError: {error}", pytrace=False)


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
    if bounds_of(item, config_of(item)) != item.stash[GATE].bounds:
        pytest.fail(
            f"{item.nodeid}: its kld markers changed after its figures were computed, so the new limits were not "
            "checked. Set markers before the kld fixture is used.",
            pytrace=False,
        )
    gate = item.stash[GATE]
    if (state := state_of(gate)) == "pass":
        return
    item.stash[_BODY_PASSED] = True
    outcome = config_of(item).inconclusive if state == "inconclusive" else "fail"
    if outcome == "fail":
        pytest.fail(explain(gate), pytrace=False)
    if outcome == "skip":
        pytest.skip(explain(gate))


def state_of(gate: Gate) -> State:
    """Return the worse state of both verdicts, on the figures and on the speed."""
    states = {gate.kld.verdict().state} | ({gate.speed.state} if gate.speed else set())
    return "fail" if "fail" in states else "inconclusive" if "inconclusive" in states else "pass"


def explain(gate: Gate) -> str:
    """Return the explanations of both verdicts, the one that does not pass first."""
    kld, speed = gate.kld, gate.speed
    told = [(kld.verdict().state, kld.explain())]
    if speed is not None and speed.checks:
        told.append((speed.state, speed.explain(kld.candidate)))
    order = ("fail", "inconclusive", "pass")
    return "\n".join(text for _, text in sorted(told, key=lambda one: order.index(one[0])))


def attach_result(item: pytest.Item, report: pytest.TestReport) -> None:
    """Attach the result to the report of the phase that decided it, so that reports and xdist find it.

    A test that is skipped is not gated and has no result. A test that is expected to fail has one: it was measured.
    """
    if report.when == "setup":
        item.stash[SETUP_SECONDS] = report.duration
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
    if kld is not None and result.body_passed is False and state_of(item.stash[GATE]) != "pass":
        report.sections.append(("kld", explain(item.stash[GATE])))
    if result.outcome == "failed" and result.diagnosis:
        from pytest_kld.report.diagnosis import diagnosis_lines

        report.sections.append(("kld diagnosis", plain("\n".join(diagnosis_lines(result.diagnosis)), keep=LINES)))


def _result(item: pytest.Item, report: pytest.TestReport, kld: KLD | None) -> GateResult:
    from pytest_kld.gate.result import GateResult
    from pytest_kld.settings.subjects import candidate_of, on_path, reference_as_named

    config = config_of(item)
    gate = item.stash.get(GATE, None)
    state = state_of(gate) if gate else "pass"
    called, xfail = report.when == "call", hasattr(report, "wasxfail")
    body_passed = (report.passed or item.stash.get(_BODY_PASSED, False)) if called else None
    outcome: Outcome = "passed"
    if kld is None or not called:
        outcome = "error"
    elif not body_passed or state == "fail":
        outcome = "failed"
    elif state == "inconclusive":
        outcome = _OUTCOMES[config.inconclusive]
    return GateResult(
        nodeid=item.nodeid,
        suite=config.suite,
        reference=kld.subjects["reference"] if kld else on_path(reference_as_named(config), candidate_of(item).path),
        candidate=kld.subjects["candidate"] if kld else candidate_of(item),
        outcome=outcome,
        xfail=xfail,
        message="" if outcome == "passed" else report.longreprtext,
        body_passed=body_passed,
        undecided=config.inconclusive,
        speed=gate.speed.to_json() if gate and gate.speed else None,
        trust_remote_code=config.trust_remote_code,
        seconds=item.stash.get(SETUP_SECONDS, 0.0) + (report.duration if called else 0.0),
        **(
            kld.measured(profile=config.html is not None or config.json is not None)
            if kld
            else {"floor": item.stash.get(FLOOR, None)}
        ),
    )


def _kld_of(item: pytest.Item) -> KLD | None:
    gate = item.stash.get(GATE, None)
    return gate.kld if gate else None
