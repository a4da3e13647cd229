"""Allowances and changes, on given figures."""

from __future__ import annotations

import math

import pytest

from pytest_kld.figures.interval import Interval
from pytest_kld.gate.regression import FIGURES, Allowance, Change, changes
from pytest_kld.gate.verdict import Verdict

FIGURES_NOW = {"mean": 0.021, "p99": 0.5, "top1_agreement": 0.90, "flips": None, "candidate_nan_count": 0}


def change(now: float, before: float, allowed: str, interval: Interval | None = None, **more: bool) -> Change:
    allowance = Allowance.parse(allowed)
    limit = FIGURES[allowance.figure]
    return Change(limit=limit, before=before, value=now, allowance=allowance, interval=interval, **more)


@pytest.mark.parametrize(
    ("text", "figure", "amount", "relative"),
    [("mean:5%", "mean", 0.05, True), ("p99:0.01", "p99", 0.01, False), ("top1: 1 %", "top1", 0.01, True)],
)
def test_allowances_are_percentages_or_amounts(text: str, figure: str, amount: float, relative: bool) -> None:
    if " " in text:
        with pytest.raises(ValueError, match="expected a number"):
            Allowance.parse(text)
    else:
        assert Allowance.parse(text) == Allowance(figure=figure, amount=amount, relative=relative)


@pytest.mark.parametrize(
    "text", ["mean", "mean:", "mean:x", "mean:-1", "mean:1e999", "mean:5%%", "avg:5%", "mean:nan%", ":5%", "p99:1:2"]
)
def test_other_allowances_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got '") as caught:
        Allowance.parse(text)
    assert str(caught.value).endswith((f"got {text!r}", f"got {text.partition(':')[2]!r}"))


@pytest.mark.parametrize("text", ["mean:5%", "log_ppl_ratio:0.01"])
def test_an_allowance_is_told_as_it_is_written(text: str) -> None:
    assert str(Allowance.parse(text)) == str(Allowance.parse(text.replace("_", "-"))) == text


@pytest.mark.parametrize(
    ("now", "before", "allowed", "state"),
    [
        (0.0104, 0.01, "mean:5%", "pass"),
        (0.0106, 0.01, "mean:5%", "fail"),
        (0.0106, 0.01, "mean:0.001", "pass"),
        (0.005, 0.01, "mean:0", "pass"),  # better
        (0.90, 0.92, "top1:0.01", "fail"),  # less agreement is worse
        (0.95, 0.92, "top1:0", "pass"),
        (1e-9, 0.0, "mean:50%", "fail"),  # no share of 0 is more than 0
        (0.0, 0.0, "mean:0%", "pass"),
        (math.inf, math.inf, "mean:0%", "pass"),
        (math.inf, 0.1, "mean:1000%", "fail"),
        (math.nan, 0.1, "mean:1000%", "fail"),
        (-0.02, -0.03, "log_ppl_ratio:50%", "pass"),  # a share of the size of a negative figure
        (-0.01, -0.03, "log_ppl_ratio:50%", "fail"),
        (2, 1, "nan:0", "fail"),
    ],
)
def test_a_loss_beyond_the_allowance_fails(now: float, before: float, allowed: str, state: str) -> None:
    assert change(now, before, allowed).state == state


@pytest.mark.parametrize(
    ("low", "high", "figure", "state"),
    [
        (0.0, 0.0009, "mean", "pass"),
        (0.0, 0.0011, "mean", "inconclusive"),
        (0.0011, 0.002, "mean", "fail"),
        (-0.0009, 0.0, "top1", "pass"),
        (-0.002, 0.0, "top1", "inconclusive"),
        (-0.003, -0.002, "top1", "fail"),
        (-math.inf, math.inf, "mean", "inconclusive"),
    ],
)
def test_an_interval_decides_only_if_it_is_asked_to(low: float, high: float, figure: str, state: str) -> None:
    interval = Interval(low=low, high=high, confidence=0.95, effective_positions=1000.0)
    assert change(0.5, 0.5, f"{figure}:0.001", interval, decides=True).state == state
    assert change(0.5, 0.5, f"{figure}:0.001", interval).state == "pass"


def test_changes_are_shown_without_a_bound_and_a_bounded_figure_must_exist() -> None:
    before = {**FIGURES_NOW, "mean": 0.02}
    shown = changes(before, FIGURES_NOW, ())
    assert [one.limit.figure for one in shown] == ["mean", "p99", "top1_agreement"]
    assert Verdict(checks=(), changes=shown).passed
    with pytest.raises(ValueError, match=r"flips:1% cannot be checked: the baseline has no share of flips$"):
        changes(before, FIGURES_NOW, (Allowance.parse("flips:1%"),))
    with pytest.raises(ValueError, match=r"mean:1% cannot be checked: this result has no mean KLD$"):
        changes(before, {**FIGURES_NOW, "mean": None}, (Allowance.parse("mean:1%"),))
    assert [one.limit.figure for one in changes(before, {**FIGURES_NOW, "mean": None}, ())] == ["p99", "top1_agreement"]
    assert [one.limit.figure for one in changes({"top1_agreement": 0.9}, FIGURES_NOW, ())] == ["top1_agreement"]


def test_a_regression_fails_the_verdict_and_is_explained() -> None:
    before = {**FIGURES_NOW, "mean": 0.02}
    found = changes(before, FIGURES_NOW, (Allowance.parse("mean:4%"), Allowance.parse("p99:0.1")))
    verdict = Verdict(checks=(), changes=found)
    assert verdict.state == "fail"
    lines = verdict.explain("B", "A", {"positions": 9, "infinite_count": 0}).splitlines()
    assert lines[0].startswith("1 of 2 KLD limits exceeded")
    assert lines[1:] == [
        "  FAIL  mean KLD 0.021 nats, baseline 0.02: +0.001, +5.0%; beyond max_regression mean:4% (0.0008 nats)",
        "  ok    P99 KLD 0.5 nats, baseline 0.5: +0, +0.0%; within max_regression p99:0.1 (0.1 nats)",
        "  note  top-1 agreement 0.9, baseline 0.9: +0, +0.0%",
    ]


def test_a_change_is_told_with_its_interval_and_without_a_share_of_nothing() -> None:
    interval = Interval(low=-1.0, high=2.0, confidence=0.95, effective_positions=1000.0)
    open_change = change(1200, 0, "nan:1", interval, decides=True)
    assert str(open_change) == (
        "candidate NaN count 1,200, baseline 0: +1200 [-1, +2]; undecided at max_regression nan:1 (1)"
    )


def test_a_change_below_twice_the_floor_is_told_with_both_figures_and_the_floor() -> None:
    small = Change(limit=FIGURES["mean"], before=0.02, value=0.021, floor=0.001)
    assert str(small) == (
        "mean KLD 0.021 nats, baseline 0.02: +0.001, +5.0%, below twice the floor of 0.001: "
        "not distinguishable from run-to-run noise"
    )


def test_each_change_takes_the_interval_of_its_figure_and_whether_it_decides() -> None:
    interval = Interval(low=0.0, high=1.0, confidence=0.95, effective_positions=1000.0)
    before, allowed = {**FIGURES_NOW, "mean": 0.02}, (Allowance.parse("mean:100%"),)
    for decides, state in ((False, "pass"), (True, "inconclusive")):
        mean, p99, _ = changes(before, FIGURES_NOW, allowed, intervals={"mean": interval}, decides=decides)
        assert (mean.interval, mean.state, p99.interval) == (interval, state, None)
        told = Verdict(checks=(), changes=(mean,)).explain("B", "A", {"positions": 9, "infinite_count": 0})
        assert told.splitlines()[0].endswith(
            "inconclusive at confidence 0.95: B against A, 9 positions"
            if decides
            else "limits: B against A, 9 positions"
        )
    assert changes(before, FIGURES_NOW, allowed, intervals={"mean": interval})[0].state == "pass"
