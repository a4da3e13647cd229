"""Intervals: against textbook values, against plain loops, and against simulated texts whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmarks import coverage
from pytest_kld.figures.scores import COLUMNS, EXTENDED_COLUMNS, Scores, Summary
from pytest_kld.figures.uncertainty import (
    FIGURES,
    Blocks,
    Mean,
    correlation_length,
    intervals,
    macro_average,
    student_quantile,
)


def make_scores(kl: Any, stride: int, **columns: Any) -> Scores:
    """A table with this KL [windows, positions]; both sides agree on everything unless told otherwise."""
    kl = np.asarray(kl, dtype=np.float64)
    table = {name: np.zeros(kl.shape, dtype) for name, dtype in COLUMNS.items()}
    table["kl"] = kl
    table.update({name: np.asarray(column, COLUMNS[name]) for name, column in columns.items()})
    protocol = {"windows": kl.shape[0], "window_size": kl.shape[1], "stride": stride}
    return Scores(columns=table, about={"protocol": protocol})


def independent(windows: int = 8, size: int = 512, seed: int = 0) -> Scores:
    return make_scores(np.random.default_rng(seed).exponential(size=(windows, size)), size)


@pytest.mark.parametrize(
    ("probability", "degrees_of_freedom", "value"),
    [  # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
        (0.975, 1, 12.706),
        (0.975, 10, 2.228),
        (0.995, 5, 4.032),
        (0.999, 20, 3.552),
        (0.9, 47, 1.300),
        (0.975, 1e6, 1.960),
    ],
)
def test_student_quantiles_are_those_of_the_tables(probability: float, degrees_of_freedom: float, value: float) -> None:
    assert student_quantile(probability, degrees_of_freedom) == pytest.approx(value, abs=6e-4)


def test_every_interval_contains_its_figure() -> None:
    scores = coverage.simulate(np.random.default_rng(0), 20)
    figures = Summary.of(scores).to_json()
    for name, interval in intervals(scores, 0.95).items():
        assert interval.low < figures[name] < interval.high, name
        assert interval.confidence == 0.95


def test_figures_with_intervals_are_figures_of_the_summary() -> None:
    assert set(FIGURES) <= set(Summary.__slots__)


def test_interval_of_a_mean_is_the_sandwich_over_blocks_of_source_text() -> None:
    rng = np.random.default_rng(1)
    scores = make_scores(rng.normal(5, 1, (30, 64)), 16)  # symmetric: there is no skewness to correct
    blocks = Blocks.cut(scores)
    kl = scores.columns["kl"]
    squares = {}
    for length in (blocks.length, blocks.length // 2):
        sums = dict.fromkeys(range(2 * blocks.count), 0.0)
        for window in range(30):
            for position in range(64):
                sums[(16 * window + position) // length] += kl[window, position] - kl.mean()
        squares[length] = sum(x * x for x in sums.values())
    whole, half = squares[blocks.length], squares[blocks.length // 2]
    error = math.sqrt(blocks.count / (blocks.count - 1) * max(whole, 2 * whole - half)) / kl.size
    interval = intervals(scores, 0.95)["mean"]
    half = (interval.high - interval.low) / 2
    assert half == pytest.approx(student_quantile(0.975, blocks.count - 1) * error, rel=0.03)
    assert interval.effective_positions == pytest.approx(kl.var() / error**2)


def test_scoring_the_same_tokens_again_adds_no_certainty() -> None:
    size, stride, windows = 256, 64, 20
    text = np.random.default_rng(2).exponential(size=stride * (windows - 1) + size)
    overlapping = make_scores([text[i * stride : i * stride + size] for i in range(windows)], stride)
    once = make_scores(text[None], text.size)
    many, few = intervals(overlapping, 0.95), intervals(once, 0.95)
    for name in ("mean", "median", "p95"):
        widths = [interval.high - interval.low for interval in (many[name], few[name])]
        assert widths[0] == pytest.approx(widths[1], rel=0.35), name
        assert many[name].effective_positions < 1.5 * text.size < overlapping.columns["kl"].size


def test_blocks_hold_whole_strides_or_strides_whole_blocks() -> None:
    for windows in (2, 5, 13, 40):
        blocks = Blocks.cut(coverage.simulate(np.random.default_rng(windows), windows))
        half = blocks.length // 2
        assert half % 512 == 0 or half == math.ceil(512 / round(512 / half))
        assert blocks.tokens == 512 * (windows - 1) + 2048


def test_correlation_along_the_text_makes_blocks_longer() -> None:
    source = np.arange(8 * 512).reshape(8, 512)
    lone = independent()
    moving = np.convolve(np.random.default_rng(3).exponential(size=8 * 512 + 99), np.ones(100), "valid")
    related = make_scores(moving.reshape(8, 512), 512)
    assert correlation_length(lone, source) < 10
    assert 60 < correlation_length(related, source) < 140
    assert Blocks.cut(related).length > Blocks.cut(lone).length


def test_what_is_short_or_constant_shows_no_dependence() -> None:
    assert correlation_length(make_scores(np.arange(11.0)[None], 11), np.arange(11)[None]) == 1
    for kl in (0.0, 0.25, np.inf):
        assert correlation_length(make_scores(np.full((4, 64), kl), 64), np.arange(256).reshape(4, 64)) == 1


def test_positions_of_equal_divergence_do_not_depend_on_each_other() -> None:
    """Most positions of two close backends have a KL of exactly 0."""
    kl = independent().columns["kl"]
    mostly_nothing = make_scores(np.where(kl < np.quantile(kl, 0.7), 0.0, kl), 512)
    assert correlation_length(mostly_nothing, np.arange(8 * 512).reshape(8, 512)) < 10


def test_a_smaller_share_of_the_error_makes_intervals_wider() -> None:
    scores = independent()
    whole, tenth = intervals(scores, 0.95), intervals(scores, 0.95, spend=0.1)
    same = intervals(scores, 0.995)
    for name in whole:
        if name not in ("top1_agreement", "ppl_ratio", "log_ppl_ratio", "rms_delta_p"):  # these do not vary here
            assert tenth[name].high - tenth[name].low > whole[name].high - whole[name].low
        assert tenth[name].high == pytest.approx(same[name].high)


def test_identical_models_have_no_divergence_but_agreement_is_not_certain() -> None:
    known = intervals(make_scores(np.zeros((4, 256)), 256), 0.95)
    assert (known["mean"].low, known["mean"].high) == (0, 0)
    assert (known["p99"].low, known["p99"].high) == (0, 0)
    assert known["top1_agreement"].high == 1
    # Wilson's lower bound where all of n agree: n / (n + t²).
    t = student_quantile(0.975, Blocks.cut(make_scores(np.zeros((4, 256)), 256)).count - 1)
    assert known["top1_agreement"].low == pytest.approx(1024 / (1024 + t**2), rel=1e-3)


def test_infinite_divergence_leaves_no_finite_bound_of_the_mean() -> None:
    kl = np.random.default_rng(4).exponential(size=(8, 512))
    kl[3, 7] = math.inf
    known = intervals(make_scores(kl, 512), 0.95)
    assert (known["mean"].low, known["mean"].high) == (math.inf, math.inf)
    assert known["median"].high < 1


def test_positions_that_are_not_finite_are_left_out() -> None:
    scores = independent()
    flags = np.zeros((8, 512), np.uint8)
    flags[:, 100:110] = 2
    spoiled = make_scores(np.where(flags, math.nan, scores.columns["kl"]), 512, flags=flags)
    for name, interval in intervals(spoiled, 0.95).items():
        assert math.isfinite(interval.low), name


def test_quantile_beyond_what_a_short_text_shows_has_no_upper_bound() -> None:
    known = intervals(independent(windows=1, size=200), 0.95)
    assert known["p999"].high == math.inf
    assert known["p999"].low < known["median"].high * 20


def test_flips_are_a_share_of_the_confident_positions_alone() -> None:
    confident = np.zeros((4, 256))
    confident[:, ::4] = 0.9
    changed = np.random.default_rng(5).random((4, 256)) < 0.3
    known = intervals(make_scores(confident, 256, reference_confidence=confident, candidate_argmax=changed), 0.95)
    share = changed[:, ::4].mean()
    assert known["flips"].low < share < known["flips"].high
    assert known["flips"].effective_positions == pytest.approx(256, rel=0.6)
    assert "flips" not in intervals(make_scores(confident, 256), 0.95)


def test_macro_average_of_datasets_has_an_interval_of_its_own() -> None:
    tables = [independent(seed=seed) for seed in range(4)]
    parts = [intervals(table, 0.95) for table in tables]
    average = macro_average(parts, [Summary.of(table) for table in tables])["mean"]
    middle = np.mean([table.columns["kl"].mean() for table in tables])
    assert average.low < middle < average.high
    # Four of the same width: half of it.
    widths = [part["mean"].high - part["mean"].low for part in parts]
    assert average.high - average.low == pytest.approx(np.mean(widths) / 2, rel=0.05)


NATURAL = {
    "js": (0.0, math.log(2)),
    **dict.fromkeys(("tv", "top5_overlap", "top1_agreement", "flips", "rms_delta_p"), (0.0, 1.0)),
    **dict.fromkeys(("entropy_difference", "log_ppl_ratio"), (-math.inf, math.inf)),
}
"""What values a figure can take, other than those from 0 upwards."""


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999999])
@pytest.mark.parametrize(("windows", "size"), [(1, 2), (1, 8), (1, 64), (3, 32)])
def test_a_tiny_text_bounds_no_mean(windows: int, size: int, confidence: float) -> None:
    rng = np.random.default_rng(7)
    scores = make_scores(rng.lognormal(sigma=2, size=(windows, size)), size)
    scores.columns.update({name: rng.random((windows, size)) for name in EXTENDED_COLUMNS})
    known = intervals(scores, confidence)
    means = [name for name, figure in FIGURES.items() if isinstance(figure, Mean) and name != "decode_gap"]
    assert len(means) == 10
    for name in means:
        if size * windows < math.log((1 - confidence) / 2) / math.log(0.99):
            assert (known[name].low, known[name].high) == NATURAL.get(name, (0.0, math.inf)), name
            assert known[name].least_windows is not None
            assert known[name].least_windows > windows


def test_the_least_number_of_windows_is_what_the_positions_take() -> None:
    """Of independent positions; 95 % needs ln 0.025 / ln 0.99 = 367.04 of them."""
    least = intervals(independent(windows=1, size=64), 0.95)["mean"].least_windows
    assert least is not None
    assert 6 <= least <= 12  # 64 positions tell only roughly that they are independent
    for windows, enough in ((5, False), (2 * least, True)):
        known = intervals(independent(windows=windows, size=64), 0.95)["mean"]
        assert (known.least_windows is None, known.high < 2) == (enough, enough)
    # Where windows overlap, a further one adds a stride.
    overlapping = make_scores(np.random.default_rng(8).exponential(size=(2, 64)), 16)
    least = intervals(overlapping, 0.95)["mean"].least_windows
    assert least is not None
    assert least >= 1 + math.ceil((368 - 64) / 16)


@pytest.mark.parametrize(("confidence", "positions"), [(0.95, 367.04), (0.999999, 1443.5), (0.5, 137.9)])
def test_more_confidence_takes_more_positions(confidence: float, positions: float) -> None:
    assert FIGURES["mean"].least_positions(1 - confidence) == pytest.approx(positions, abs=0.1)
    assert FIGURES["p99"].least_positions(1 - confidence) == pytest.approx(positions, abs=0.1)
    assert FIGURES["p999"].least_positions(1 - confidence) > 9 * positions
    assert FIGURES["median"].least_positions(1 - confidence) < 22


def test_scoring_a_token_again_does_not_show_more_of_the_tail() -> None:
    """Windows of 200 tokens, each of which begins a token after the one before it: 299 tokens in all."""
    scores = make_scores(np.random.default_rng(9).exponential(size=(100, 200)), 1)
    known = intervals(scores, 0.95)
    assert known["mean"].high == known["p99"].high == math.inf


def test_a_short_text_still_bounds_a_high_quantile_from_below() -> None:
    known = intervals(independent(windows=2, size=64), 0.95)["p99"]
    assert known.least_windows is not None
    assert 0 < known.low < known.high == math.inf


def test_a_macro_average_takes_what_one_dataset_needs() -> None:
    tables = [independent(seed=0), independent(windows=1, size=64, seed=1)]
    parts = [intervals(table, 0.95) for table in tables]
    average = macro_average(parts, [Summary.of(table) for table in tables])
    assert parts[1]["mean"].least_windows is not None
    assert average["mean"].least_windows == 2 * parts[1]["mean"].least_windows
    assert (average["mean"].low, average["mean"].high) == (parts[0]["mean"].low / 2, math.inf)
    assert average["median"].least_windows is None


@pytest.mark.parametrize(("windows", "size", "sigma"), [(1, 2, coverage.SIGMA), (1, 8, coverage.SIGMA), (1, 64, 2.0)])
def test_no_tiny_text_passes_a_candidate_that_is_over_its_limit(windows: int, size: int, sigma: float) -> None:
    """Intervals that were clipped to what was seen passed 60, 27 and 24 % of such texts."""
    row = coverage.passes(200, windows, size, size, sigma, seed=0)
    assert (row["wrong pass"], row["wrong fail"], row["too few"]) == (0, 0, 1)


def test_95_percent_intervals_cover_on_overlapping_windows_with_a_heavy_tail() -> None:
    """A coverage between 93 and 97 % is what is claimed; 200 texts show it to within 3 binomial standard errors.

    benchmarks/coverage.py shows it more closely, with thousands.
    """
    texts = 200
    slack = 3 * math.sqrt(0.93 * 0.07 / texts)
    for name, row in coverage.coverage(texts, 100, seed=1).items():
        assert 0.93 - slack <= row["covered"] <= min(1.0, 0.97 + slack), name
        # An interval that takes positions for independent misses far more often than 5 %.
        assert row["naive"] < 0.93 - slack, name
