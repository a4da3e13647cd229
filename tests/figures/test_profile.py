"""Profiles against counts made one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import execnet
import numpy as np
import pytest

from pytest_kld.figures.profile import SMALLEST, profile_of
from pytest_kld.figures.scores import Scores

SIZE, STRIDE = 40, 10


def scores(kl: list[list[float]] | np.ndarray) -> Scores:
    return Scores(columns={"kl": np.asarray(kl, np.float64)}, about={"protocol": protocol(kl)})


def protocol(kl: np.ndarray, *windows: int) -> dict[str, object]:
    """Return the protocol of windows from one text, or of so many windows from each of several."""
    count, size = np.shape(kl)
    return {"stride": STRIDE, "window_size": size, "datasets": [{"windows": number} for number in windows or (count,)]}


@pytest.fixture
def table() -> Scores:
    """Overlapping windows with a heavy tail, NaN, exact zeros and an infinite KL."""
    kl = np.random.default_rng(0).lognormal(-4, 2, (6, SIZE))
    kl[0, :3] = np.nan
    kl[1, 5:7] = 0
    kl[4, 4] = np.inf
    return scores(kl)


def valid(table: Scores) -> list[float]:
    return [float(x) for x in table.columns["kl"].ravel() if not math.isnan(x)]


def test_histogram_counts_every_drawn_position_once(table: Scores) -> None:
    profile = profile_of(table)
    for lower, upper, count in profile["histogram"]:
        assert count == sum(lower <= x < upper for x in valid(table)) > 0
        assert upper / lower == pytest.approx(10 ** (1 / 8), rel=1e-4)
    assert profile["below"] == sum(x < SMALLEST for x in valid(table)) == 2
    assert sum(count for *_, count in profile["histogram"]) + 2 + 1 == len(valid(table))


def test_survival_gives_the_share_of_positions_with_at_least_that_much(table: Scores) -> None:
    survival = profile_of(table)["survival"]
    positions = valid(table)
    assert survival[0] == [math.inf, pytest.approx(1 / len(positions), rel=1e-5)]
    assert survival[-1] == [0, 1]
    for kl, share in survival[1:]:
        assert share == pytest.approx(sum(x >= kl * (1 - 1e-5) for x in positions) / len(positions), rel=1e-4)
    assert [share for _, share in survival] == sorted(share for _, share in survival)


def test_text_takes_a_position_where_it_is_in_the_text_once_for_each_window(table: Scores) -> None:
    kl = table.columns["kl"]
    at: dict[int, list[float]] = {}
    for window in range(len(kl)):
        for position in range(SIZE):
            if not math.isnan(kl[window, position]):
                at.setdefault(window * STRIDE + position, []).append(kl[window, position])
    text = profile_of(table)["text"]
    assert text[0][0] == 3  # the first three places have no valid position
    assert text[-1][1] == 5 * STRIDE + SIZE
    for start, stop, mean, largest in text:
        here = [x for place in range(start, stop) for x in at.get(place, [])]
        assert mean == pytest.approx(sum(here) / len(here), rel=1e-5)
        assert largest == pytest.approx(max(here), rel=1e-5)


def test_several_texts_follow_one_another_and_positions_that_are_left_out_keep_their_place() -> None:
    kl = np.full((3, SIZE), 0.5)
    kl[2, 7] = 3
    table = Scores(columns={"kl": kl}, about={"protocol": protocol(kl, 2, 1)}).without_first(5)
    text = profile_of(table)["text"]
    assert text[0][0] == 5
    assert text[-1][1] == STRIDE + SIZE + SIZE
    peak = STRIDE + SIZE + 7
    assert [[start, stop] for start, stop, _, largest in text if largest == 3] == [[peak, peak + 1]]
    assert not any(STRIDE + SIZE <= start < STRIDE + SIZE + 5 for start, *_ in text)


def test_windows_have_mean_and_maximum_or_nothing() -> None:
    kl = np.array([[0.1, 0.3, np.nan], [np.nan] * 3])
    assert profile_of(scores(kl))["windows"] == [[0.2, 0.3], None]


def test_profile_of_the_standard_protocol_is_small_and_fit_for_travelling_between_processes() -> None:
    kl = np.random.default_rng(1).lognormal(-5, 1.5, (100, 2048))
    sent = execnet.dumps(profile_of(scores(kl)))
    assert len(sent) < 32_000  # bytes
    assert execnet.loads(sent)["text"][0][0] == 0


def test_gap_is_the_mean_along_the_window_of_what_is_known_on_each_side() -> None:
    kl = np.ones((2, 100))
    ours = np.tile(np.arange(100.0), (2, 1))
    theirs = np.full((2, 100), np.nan)
    theirs[1, 50:] = 7
    table = replace(scores(kl), columns={"kl": kl, "decode_gap": ours, "reference_decode_gap": theirs})
    gap = profile_of(table)["gap"]
    assert gap[0][0] == 0
    assert [row[0] for row in gap] == sorted({row[0] for row in gap})
    for (start, candidate, reference), stop in zip(gap, [*(row[0] for row in gap[1:]), 100], strict=True):
        assert candidate == pytest.approx(np.arange(start, stop).mean(), rel=1e-3)
        assert reference == (7 if stop > 50 else None)
    assert profile_of(scores(kl))["gap"] == []
