"""Medians over rounds and their intervals, against what the binomial distribution says; gauges of a server."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from pytest_kld.throughput.figures import least_rounds, median_interval, ratio_interval
from pytest_kld.throughput.gauges import Gauges


@pytest.mark.parametrize("rounds", [1, 2, 5, 6, 7, 9, 12, 20])
@pytest.mark.parametrize("confidence", [0.5, 0.75, 0.9, 0.95, 0.99])
def test_the_interval_is_the_narrowest_whose_coverage_is_what_was_asked(rounds: int, confidence: float) -> None:
    values = list(range(1, rounds + 1))
    interval = median_interval(values[::-1], confidence)

    def coverage(k: int) -> float:
        """Share of all outcomes in which the median lies between the k-th smallest and the k-th largest value."""
        outcomes = np.array([sum(signs) for signs in product((0, 1), repeat=min(rounds, 12))])
        if rounds <= 12:
            return float(np.mean((outcomes >= k) & (outcomes <= rounds - k)))
        return sum(math.comb(rounds, below) for below in range(k, rounds - k + 1)) / 2**rounds

    good = [k for k in range(1, rounds // 2 + 1) if coverage(k) >= confidence]
    if good:
        assert (interval.low, interval.high) == (max(good), rounds + 1 - max(good))
        assert interval.least_rounds is None
    else:
        assert (interval.low, interval.high) == (-math.inf, math.inf)
        assert interval.least_rounds is not None
        assert interval.least_rounds > rounds


@pytest.mark.parametrize(("confidence", "least"), [(0.5, 2), (0.9, 5), (0.95, 6), (0.975, 7), (0.99, 8)])
def test_the_least_number_of_rounds_just_reaches_the_confidence(confidence: float, least: int) -> None:
    assert least_rounds(confidence) == least
    assert median_interval(list(range(least)), confidence).least_rounds is None
    assert median_interval(list(range(least - 1)), confidence).least_rounds == least


def test_the_interval_of_a_ratio_covers_the_true_ratio_at_least_as_often_as_claimed() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        ours, theirs = random.lognormal(0.4, 0.3, 9), random.lognormal(0.0, 0.3, 9)
        interval = ratio_interval(list(ours), list(theirs), 0.9)
        hits += interval.low <= math.exp(0.4) <= interval.high
    assert hits / 400 >= 0.9


def test_a_ratio_of_too_few_rounds_has_no_interval_and_says_how_many_are_needed() -> None:
    interval = ratio_interval([1.0] * 6, [1.0] * 6, 0.95)
    assert (interval.low, interval.high, interval.least_rounds) == (0.0, math.inf, 7)


def test_gauges_are_summed_over_their_labels_and_idle_readings_are_left_out() -> None:
    gauges = Gauges(["sglang:gen_throughput", "missing"])
    line = 'sglang:gen_throughput{{dp_rank="{}"}} {}\n'
    for first, second in ((0, 0), (10, 20), (30, 40), (20, 20), (1, math.inf), (1, math.nan)):
        gauges.read("# TYPE sglang:gen_throughput gauge\n" + line.format(0, first) + line.format(1, second))
    assert gauges.medians() == {"sglang:gen_throughput": 40}
