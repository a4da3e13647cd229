"""Gating on intervals: three states of a limit, the outcomes of an undecided one, and where intervals are reported."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pytest_kld.figures.interval import Interval
from pytest_kld.gate.limits import LIMITS
from pytest_kld.gate.verdict import Check, judge

SMALL_RUN = ("--kld-dataset=python-docs", "--kld-windows=24", "--kld-window-size=64", "--kld-stride=32")


def check(name: str, value: float, bound: float, low: float, high: float) -> Check:
    interval = Interval(low=low, high=high, confidence=0.95, effective_positions=100)
    return Check(limit=LIMITS[name], value=value, bound=bound, interval=interval, windows=50)


@pytest.mark.parametrize(
    ("low", "high", "state"),
    [
        (0.03, 0.05, "pass"),  # a figure equal to the bound is within it
        (0.03, 0.0501, "inconclusive"),
        (0.05, 0.08, "inconclusive"),
        (0.0501, 0.08, "fail"),
        (math.inf, math.inf, "fail"),
        (math.nan, math.nan, "fail"),
    ],
)
def test_upper_limit_has_three_states(low: float, high: float, state: str) -> None:
    assert check("max_mean", 0.05, 0.05, low, high).state == state


@pytest.mark.parametrize(("low", "high", "state"), [(0.9, 1, "pass"), (0.8, 0.95, "inconclusive"), (0.5, 0.89, "fail")])
def test_lower_limit_has_three_states(low: float, high: float, state: str) -> None:
    assert check("min_top1", 0.9, 0.9, low, high).state == state


def test_a_limit_without_an_interval_is_held_as_a_point() -> None:
    interval = Interval(low=0.01, high=0.2, confidence=0.95, effective_positions=100)
    verdict = judge(
        {"mean": 0.04, "candidate_nan_count": 1}, {"max_mean": 0.05, "max_nan": 0}, intervals={"mean": interval}
    )
    assert [check.state for check in verdict.checks] == ["inconclusive", "fail"]
    assert (verdict.state, verdict.decided) == ("fail", False)


def test_words_name_the_interval_and_how_many_more_windows_would_settle_it() -> None:
    undecided = check("max_mean", 0.04, 0.05, 0.03, 0.055)
    # (1.43 × 0.015 / 0.01)² = 4.6 times the text, so 3.6 times 50 more windows.
    assert undecided.more_windows == 181
    assert str(undecided) == (
        "mean KLD 0.04 nats [0.03, 0.055] <= max_mean 0.05 (within by 0.01); "
        "about 181 more windows would probably settle it"
    )
    close = check("max_mean", 0.0499, 0.05, 0.03, 0.07)
    assert close.more_windows is None
    assert str(close).endswith("too close to the limit for any sensible number of windows")
    assert check("max_mean", 0.04, 0.05, 0.03, 0.045).more_windows is None


def test_too_few_windows_for_an_interval_are_named() -> None:
    interval = Interval(low=0, high=math.inf, confidence=0.95, effective_positions=9, least_windows=12)
    few = Check(limit=LIMITS["max_mean"], value=0.01, bound=0.05, interval=interval, windows=5)
    assert (few.state, few.more_windows) == ("inconclusive", 7)
    assert str(few) == (
        "mean KLD 0.01 nats [0, inf] <= max_mean 0.05 (within by 0.04); "
        "too few positions for confidence 0.95: at least 12 windows are needed, and there are 5"
    )


@pytest.mark.parametrize("size", [2, 8, 64])
def test_one_tiny_window_does_not_pass_at_any_confidence(
    pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path, size: int
) -> None:
    result = pytester.runpytest(
        f"--kld-ref={reference_dir}",
        f"--kld-candidate={candidate_dir}",
        *("--kld-cache-dir=cache", "--kld-dataset=python-docs", "--kld-windows=1", f"--kld-window-size={size}"),
        *("--kld-max-mean=5", "--kld-confidence=0.999999", "--kld-json=report.json", "--kld-junit=gate.xml"),
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*[?]*[[]0, inf[]] <= max_mean 5 *; too few positions for confidence 0.999999: at least * windows are needed*"]
    )
    (gated,) = json.loads((pytester.path / "report.json").read_text())["results"]
    assert gated["intervals"]["mean"]["least_windows"] >= 1444 // size
    case = ET.parse(pytester.path / "gate.xml").find(".//testcase[@name='max_mean']")
    assert case is not None
    assert "windows are needed, and there are 1" in (case.findtext("system-out") or "")


class Gate:
    """Runs the gate with the limit equal to the measured mean, which no interval can decide."""

    def __init__(self, pytester: pytest.Pytester, reference: Path, candidate: Path) -> None:
        self.pytester = pytester
        self.models = (f"--kld-ref={reference}", f"--kld-candidate={candidate}", "--kld-cache-dir=cache", *SMALL_RUN)
        pytester.runpytest(*self.models, "--kld-json=point.json")
        (self.point,) = json.loads((pytester.path / "point.json").read_text())["results"]
        self.limit = f"--kld-max-mean={self.point['figures']['mean'] * 1.0001:.12f}"

    def run(self, *options: str) -> pytest.RunResult:
        return self.pytester.runpytest(*self.models, self.limit, "-rs", *options)


@pytest.fixture
def gate(pytester: pytest.Pytester, reference_dir: Path, candidate_dir: Path) -> Gate:
    return Gate(pytester, reference_dir, candidate_dir)


def test_without_the_option_figures_are_held_and_no_interval_is_reported(gate: Gate) -> None:
    gate.run().assert_outcomes(passed=1)
    assert gate.point["intervals"] == {}


def test_an_undecided_limit_fails_by_default_and_says_so(gate: Gate) -> None:
    result = gate.run("--kld-confidence=0.95")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*1 of 4 KLD limits inconclusive at confidence 0.95:*",
            "*?*mean KLD * nats [[]*, *] <= max_mean *",
            "*FAIL (inconclusive)*",
            "*Mean KLD interval*",
        ]
    )


@pytest.mark.parametrize(("outcome", "expected"), [("pass", {"passed": 1}), ("skip", {"skipped": 1})])
def test_outcome_of_an_undecided_limit_is_configurable(gate: Gate, outcome: str, expected: dict[str, int]) -> None:
    gate.pytester.makeini(f"[pytest]\nkld_confidence = 0.95\nkld_inconclusive = {outcome}\n")
    result = gate.run("--kld-json=report.json", "--kld-junit=gate.xml")
    result.assert_outcomes(**expected)
    result.stdout.fnmatch_lines([f"*{outcome} (inconclusive)*"])
    (gated,) = json.loads((gate.pytester.path / "report.json").read_text())["results"]
    assert gated["outcome"] == ("passed" if outcome == "pass" else "skipped")
    case = ET.parse(gate.pytester.path / "gate.xml").find(".//testcase[@name='max_mean']")
    assert case is not None
    assert (case.find("skipped") is not None) == (outcome == "skip")
    assert case.find("failure") is None


def test_reports_carry_the_intervals(gate: Gate) -> None:
    gate.run("--kld-confidence=0.9", "--kld-json=report.json", "--kld-junit=gate.xml", "--junitxml=pytest.xml")
    (gated,) = json.loads((gate.pytester.path / "report.json").read_text())["results"]
    interval = gated["intervals"]["mean"]
    assert interval["low"] < gated["figures"]["mean"] < interval["high"]
    assert interval["confidence"] == 0.9
    assert 0 < interval["effective_positions"] < 24 * 64
    (mean,) = [check for check in gated["checks"] if check["limit"] == "max_mean"]
    assert (mean["state"], mean["passed"]) == ("inconclusive", False)

    case = ET.parse(gate.pytester.path / "gate.xml").find(".//testcase[@name='max_mean']")
    assert case is not None
    out = case.findtext("system-out") or ""
    assert f"low {interval['low']}" in out
    assert f"effective_positions {interval['effective_positions']}" in out
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("type") == "limit undecided"

    named = {one.get("name"): one.get("value") for one in ET.parse(gate.pytester.path / "pytest.xml").iter("property")}
    assert named["kld_confidence"] == "0.9"
    assert named["kld_mean_low"] == str(interval["low"])
    assert named["kld_p99_high"] == str(gated["intervals"]["p99"]["high"])


def test_a_clear_failure_stays_a_failure_whatever_undecided_ones_become(
    pytester: pytest.Pytester, reference_dir: Path, broken_dir: Path
) -> None:
    gate = Gate(pytester, reference_dir, broken_dir)
    result = gate.run("--kld-confidence=0.95", "--kld-inconclusive=skip", "--kld-max-p99=0.0001")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*1 of 5 KLD limits exceeded*", "*FAIL*P99 KLD*", "*?*mean KLD*"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--kld-confidence=95", "*--kld-confidence: expected a number of at least 0.5 and at most 0.999999*'95'*"),
        ("--kld-confidence=much", "*--kld-confidence: expected a number*'much'*"),
        ("--kld-inconclusive=maybe", "*--kld-inconclusive: expected one of fail, pass, skip, got 'maybe'*"),
        ("--kld-windows=auto:0", "*--kld-windows: expected a whole number*'0'*"),
        ("--kld-windows=automatic", "*--kld-windows: expected a whole number*'automatic'*auto*"),
    ],
)
def test_bad_values_are_usage_errors(pytester: pytest.Pytester, option: str, message: str) -> None:
    result = pytester.runpytest(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
