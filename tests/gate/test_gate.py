"""Limits, verdicts and their words."""

from __future__ import annotations

import math

import pytest

from pytest_kld.gate.figure import Figure, explain_comparison
from pytest_kld.gate.limits import LIMITS, merge_bounds, parse_marker
from pytest_kld.gate.verdict import band, judge

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
        ("min_top1", 0.95, False, "top-1 agreement 0.9 < min_top1 0.95 (short by 0.05, 0.95x the limit)"),
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
    assert "infinite at 3 positions" in lines[-1]


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
