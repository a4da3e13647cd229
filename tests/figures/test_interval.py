"""What an interval says of the text that is still needed."""

from __future__ import annotations

import pytest

from pytest_kld.figures.interval import Interval


def interval(low: float, high: float) -> Interval:
    return Interval(low=low, high=high, confidence=0.95, effective_positions=1000)


def test_text_that_is_needed_grows_with_the_square_of_width_over_distance() -> None:
    one = interval(0.03, 0.05).times_the_text(0.04, 0.045)
    other = interval(0.02, 0.06).times_the_text(0.04, 0.045)
    assert one is not None
    assert other == pytest.approx(4 * one)


def test_the_side_towards_the_limit_counts() -> None:
    skewed = interval(0.035, 0.06)
    below, above = skewed.times_the_text(0.04, 0.05), skewed.times_the_text(0.04, 0.03)
    assert below == pytest.approx((1.43 * 2) ** 2)
    assert above == pytest.approx((1.43 * 0.5) ** 2)


@pytest.mark.parametrize("bound", [0.04, 0.0401])
def test_a_figure_at_its_limit_needs_too_much(bound: float) -> None:
    assert interval(0.03, 0.05).times_the_text(0.04, bound) is None
