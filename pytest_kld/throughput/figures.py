"""Figures of served speed: of one run of a load generator, and over several rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFigure:
    """One figure of a run at one concurrency.

    Attributes:
        name: its key in reports.
        label: its name in tables and messages.
        unit: its unit.

    """

    name: str
    label: str
    unit: str


FIGURES: Mapping[str, SpeedFigure] = {
    figure.name: figure
    for figure in (
        SpeedFigure(name="output_tps", label="output tokens/s", unit="tokens/s"),
        SpeedFigure(name="output_tps_per_request", label="output tokens/s per request", unit="tokens/s"),
        SpeedFigure(name="total_tps", label="total tokens/s", unit="tokens/s"),
        SpeedFigure(name="request_rate", label="request rate", unit="requests/s"),
        SpeedFigure(name="ttft", label="median TTFT", unit="ms"),
        SpeedFigure(name="ttft_p99", label="P99 TTFT", unit="ms"),
        SpeedFigure(name="tpot", label="median TPOT", unit="ms"),
        SpeedFigure(name="tpot_p99", label="P99 TPOT", unit="ms"),
        SpeedFigure(name="itl", label="median ITL", unit="ms"),
        SpeedFigure(name="itl_p99", label="P99 ITL", unit="ms"),
        SpeedFigure(name="e2e", label="median end-to-end latency", unit="ms"),
        SpeedFigure(name="e2e_p99", label="P99 end-to-end latency", unit="ms"),
        SpeedFigure(name="failed", label="failed requests", unit="requests"),
    )
}
"""Every figure, by name. docs/throughput.md defines them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MedianInterval:
    """A confidence interval of a median over rounds.

    Attributes:
        low, high: its ends; infinite if there are too few rounds for this confidence.
        confidence: its level.
        least_rounds: how many rounds an interval of this level needs, if there are fewer; else None.

    """

    low: float
    high: float
    confidence: float
    least_rounds: int | None = None


def median_of(rounds: Sequence[Mapping[str, float]], name: str) -> float:
    """Return the median of a figure over rounds."""
    return median(one[name] for one in rounds)


def median_interval(values: Sequence[float], confidence: float) -> MedianInterval:
    """Return the interval between two order statistics that covers the median with at least this confidence.

    The k-th smallest and the k-th largest of n independent values enclose the median with probability
    1 - 2 P(B < k), B binomial(n, 1/2) (David and Nagaraja, Order Statistics, 3rd ed., 7.1). No distribution is
    assumed. Five rounds reach 0.9375, so 0.95 needs six.
    """
    ordered, count = sorted(values), len(values)
    tail, outside = 0.0, 0  # P(B < outside)
    while outside < count // 2:
        more = tail + math.comb(count, outside) / 2**count
        if 1 - 2 * more < confidence:
            break
        tail, outside = more, outside + 1
    if outside == 0:
        return MedianInterval(
            low=-math.inf, high=math.inf, confidence=confidence, least_rounds=least_rounds(confidence)
        )
    return MedianInterval(low=ordered[outside - 1], high=ordered[-outside], confidence=confidence)


def least_rounds(confidence: float) -> int:
    """Return the smallest number of rounds whose smallest and largest value enclose the median with a confidence."""
    return math.ceil(1 - math.log2(1 - confidence))


def ratio_interval(values: Sequence[float], base: Sequence[float], confidence: float) -> MedianInterval:
    """Return an interval of the ratio of two medians, each measured by itself.

    Each median's interval gets half of the allowed error (Bonferroni), so both hold together.
    """
    each = 1 - (1 - confidence) / 2
    ours, theirs = median_interval(values, each), median_interval(base, each)
    if ours.least_rounds or theirs.least_rounds:
        return MedianInterval(low=0.0, high=math.inf, confidence=confidence, least_rounds=least_rounds(each))
    return MedianInterval(low=ours.low / theirs.high, high=ours.high / theirs.low, confidence=confidence)
