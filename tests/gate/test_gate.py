"""Limits, verdicts and their words."""

from __future__ import annotations

import math

import pytest

from pytest_kld.errors import ScoresError
from pytest_kld.figures.interval import Interval
from pytest_kld.gate.figure import Figure, explain_comparison
from pytest_kld.gate.limits import LIMITS, merge_bounds, parse_marker
from pytest_kld.gate.number import shown
from pytest_kld.gate.verdict import Check, band, judge

FIGURES = {
    "positions": 1234,
    "mean": 0.02,
    "median": 0.01,
    "p95": 0.05,
    "p99": 0.3,
    "p999": 0.5,
    "max": math.inf,
    "candidate_nan_count": 2,
    "reference_nan_count": 0,
    "top1_agreement": 0.9,
    "ppl_ratio": 1.2,
    "infinite_count": 3,
}


@pytest.mark.parametrize(
    ("limit", "bound", "passed", "words"),
    [
        ("max_mean", 0.02, True, "mean KLD 0.02 nats <= max_mean 0.02 (within by 0)"),
        ("max_mean", 0.01, False, "mean KLD 0.02 nats > max_mean 0.01 (over by 0.01, 2.00x the limit)"),
        ("max_median", 0.0, False, "median KLD 0.01 nats > max_median 0 (over by 0.01)"),
        ("max_p95", 0.06, True, "P95 KLD 0.05 nats <= max_p95 0.06 (within by 0.01)"),
        ("max_p99", 0.2, False, "P99 KLD 0.3 nats > max_p99 0.2 (over by 0.1, 1.50x the limit)"),
        ("max_p999", 1.0, True, "P99.9 KLD 0.5 nats <= max_p999 1 (within by 0.5)"),
        ("max_max", 5.0, False, "max KLD inf nats > max_max 5 (over by inf, infx the limit)"),
        ("max_nan", 1, False, "candidate NaN count 2 > max_nan 1 (over by 1, 2.00x the limit)"),
        ("max_ref_nan", 0, True, "reference NaN count 0 <= max_ref_nan 0 (within by 0)"),
        ("max_ref_nan", 10**6, True, "reference NaN count 0 <= max_ref_nan 1,000,000 (within by 1,000,000)"),
        ("min_top1", 0.95, False, "top-1 agreement 0.9 < min_top1 0.95 (short by 0.05, 0.95x the limit)"),
        ("min_top1", 0.9, True, "top-1 agreement 0.9 >= min_top1 0.9 (within by 0)"),
        ("min_top1", 0.5, True, "top-1 agreement 0.9 >= min_top1 0.5 (within by 0.4)"),
        ("max_ppl_ratio", 1.1, False, "perplexity ratio 1.2 > max_ppl_ratio 1.1 (over by 0.1, 1.09x the limit)"),
    ],
)
def test_each_limit_bounds_its_figure_and_names_value_and_margin(
    limit: str, bound: float, passed: bool, words: str
) -> None:
    (check,) = judge(FIGURES, {limit: bound}).checks
    assert check.passed is passed
    assert str(check) == words


def test_nan_is_never_within_a_limit() -> None:
    assert not judge({**FIGURES, "mean": math.nan, "top1_agreement": math.nan}, {"max_mean": 1}).passed
    assert not judge({**FIGURES, "top1_agreement": math.nan}, {"min_top1": 0}).passed


def test_explanation_lists_what_is_exceeded_before_what_is_not_and_tells_of_infinities() -> None:
    lines = judge(FIGURES, {"max_mean": 1, "max_p99": 0.1, "max_nan": 0}).explain("B", "A", FIGURES).splitlines()
    assert lines[0] == "2 of 3 KLD limits exceeded: B against A, 1,234 positions"
    assert [line.split()[0] for line in lines[1:]] == ["FAIL", "FAIL", "ok", "note"]
    assert lines[-1] == (
        "  note  KLD is infinite at 3 positions: the candidate rules out tokens that the reference considers possible"
    )


def test_within_all_limits_is_said_in_one_line_and_the_dataset_in_each_check() -> None:
    verdict = judge(FIGURES, {"max_mean": 1}, dataset="code")
    assert verdict.explain("B", "A", {**FIGURES, "infinite_count": 0}).splitlines() == [
        "within all limits: B against A, 1,234 positions",
        "  ok    mean KLD on code 0.02 nats <= max_mean 1 (within by 0.98)",
    ]


@pytest.mark.parametrize(
    ("limit", "figure", "why"),
    [
        ("max_js", "js", "the figure js was not computed; give --kld-metrics=all"),
        ("max_flips", "flips", "the reference is confident at no position, so there are no flips to count"),
        ("max_decode_gap", "decode_gap", "only the test that decodes with --kld-path=both .* measures how far"),
        ("min_experts_seen", "experts_seen", "the candidate is dense, or it is unknown which experts it used"),
    ],
)
def test_a_limit_on_a_figure_that_is_missing_is_an_error_that_says_why(limit: str, figure: str, why: str) -> None:
    with pytest.raises(ScoresError, match=f"^{limit} cannot be checked: {why}"):
        judge({**FIGURES, figure: None}, {limit: 0.1})


def interval(low: float, high: float, least_windows: int | None = None) -> Interval:
    return Interval(low=low, high=high, confidence=0.95, effective_positions=100.0, least_windows=least_windows)


@pytest.mark.parametrize(
    ("low", "high", "bound", "state", "said"),
    [
        (0.019, 0.021, 0.021, "pass", "0.02 nats [0.019, 0.021] <= max_mean 0.021 (within by 0.001)"),
        (0.019, 0.021, 0.018, "fail", "0.02 nats [0.019, 0.021] > max_mean 0.018 (over by 0.002, 1.11x the limit)"),
        # 0.004 wide on the side of a bound that is 0.002 away: (1.43 · 2)² = 8.18 times the text, 7.18 times more
        (0.016, 0.024, 0.022, "inconclusive", "(within by 0.002); about 72 more windows would probably settle it"),
        (0.016, 0.024, 0.02, "inconclusive", "; too close to the limit for any sensible number of windows"),
    ],
)
def test_an_interval_decides_and_an_open_check_says_how_much_text_would_decide_it(
    low: float, high: float, bound: float, state: str, said: str
) -> None:
    verdict = judge(FIGURES, {"max_mean": bound}, intervals={"mean": interval(low, high)}, windows=10)
    assert verdict.state == state
    assert str(verdict.checks[0]).endswith(said)


def test_an_interval_of_another_figure_decides_nothing() -> None:
    verdict = judge(FIGURES, {"max_mean": 0.018}, intervals={"p99": interval(0, 1)})
    assert verdict.state == "fail"
    assert verdict.checks[0].interval is None


def test_a_text_too_short_for_an_interval_says_how_many_windows_one_needs() -> None:
    bounds = {"max_mean": 0.5, "max_nan": 2}
    verdict = judge(FIGURES, bounds, intervals={"mean": interval(0, math.inf, least_windows=1200)}, windows=1100)
    assert verdict.explain("B", "A", {**FIGURES, "infinite_count": 0}).splitlines() == [
        "1 of 2 KLD limits inconclusive at confidence 0.95: B against A, 1,234 positions",
        "  ?     mean KLD 0.02 nats [0, inf] <= max_mean 0.5 (within by 0.48); too few positions for confidence 0.95: "
        "at least 1,200 windows are needed, and there are 1,100",
        "  ok    candidate NaN count 2 <= max_nan 2 (within by 0)",
    ]
    assert verdict.checks[0].more_windows == 100


def test_more_windows_are_at_least_one_and_none_if_nothing_is_open() -> None:
    def check(least_windows: int | None, bound: float) -> Check:
        found = interval(0.0, 1.0, least_windows)
        return Check(limit=LIMITS["max_mean"], value=0.5, bound=bound, interval=found, windows=10)

    assert check(10, bound=0.6).more_windows == 1
    assert check(10, bound=1.0).more_windows is None
    assert check(None, bound=2.0).more_windows is None


def test_a_limit_is_taken_from_the_first_layer_that_names_it_and_none_lifts_it() -> None:
    marker, options = {"max_mean": 0.1, "max_nan": None}, {"max_mean": 0.2, "max_p99": 0.3, "max_nan": 0}
    assert merge_bounds(marker, options) == {"max_mean": 0.1, "max_p99": 0.3}


def test_marker_takes_every_limit_as_number_or_text() -> None:
    numbers = {name: 1 if limit.greatest >= 1 else 0.5 for name, limit in LIMITS.items()}
    assert parse_marker((), numbers) == numbers
    assert parse_marker((), {name: str(number) for name, number in numbers.items()}) == numbers
    assert parse_marker((), {"max_mean": "0.05", "max_p99": None}) == {"max_mean": 0.05, "max_p99": None}


@pytest.mark.parametrize(
    ("mean", "word"),
    [
        (0.0, "near-lossless"),
        (0.0099, "near-lossless"),
        (0.01, "good"),
        (0.05, "noticeable"),
        (0.1, "significant"),
        (math.inf, "significant"),
        (math.nan, "unknown"),
    ],
)
def test_bands_begin_at_their_lower_edge(mean: float, word: str) -> None:
    assert band(mean) == word


def test_comparison_is_explained_from_the_figure_outwards_whichever_side_it_is_on() -> None:
    figure = Figure(0.02, label="mean KLD", unit="nats", pair="B against A")
    expected = ["0.02 < 0.01", "mean KLD of B against A is 0.02 nats, 0.01 away from 0.01"]
    assert explain_comparison("<", figure, 0.01) == expected
    assert explain_comparison(">", 0.01, figure) == expected
    assert explain_comparison("<", 0.02, 0.01) is None
    share = Figure(0.9, label="top-1 agreement", unit="", pair="B against A")
    assert explain_comparison(">", share, 0.95) == [
        "0.9 > 0.95",
        "top-1 agreement of B against A is 0.9, 0.05 away from 0.95",
    ]
    assert explain_comparison("==", figure, "0.02") is None


NO_NUMBERS = {
    **{f"10**{power}": 10**power for power in (400, 5000)},
    **{repr(text): text for text in ("1_0", "٣", "１.5", "0x1", "1e400", "nan", "inf", " ", "")},
    **{repr(value): value for value in (math.nan, math.inf, -1, True, [1])},
}


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS.keys())
@pytest.mark.parametrize("name", ["max_mean", "max_nan", "min_top1"])
def test_what_is_no_number_is_refused_by_the_marker_with_a_short_message(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^kld marker, {name}: expected a (whole )?number of at least 0") as caught:
        parse_marker((), {name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [0, 1, 0.5, "0.5", ".5", "5e-1", "1.", "0", 1e-300])
def test_numbers_in_decimal_notation_are_taken(value: float | str) -> None:
    assert parse_marker((), {"max_mean": value}) == {"max_mean": float(value)}


@pytest.mark.parametrize(
    ("value", "text"),
    [("x" * 38, repr("x" * 38)), ("x" * 39, "'" + "x" * 39 + "…"), (2**200, "a whole number of 201 bits"), (7, "7")],
)
def test_an_invalid_value_is_shown_in_at_most_40_characters(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_path_that_does_not_exist_is_refused_by_the_marker() -> None:
    assert parse_marker((), {"path": "decode", "max_mean": 1}) == {"max_mean": 1}
    with pytest.raises(ValueError, match="path"):
        parse_marker((), {"path": "training"})
