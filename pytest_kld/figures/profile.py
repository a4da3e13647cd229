"""The profile of a pair: the data for charts. The process that has the Scores makes it and sends it instead of them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytest_kld.figures.scores import GAP_COLUMNS
from pytest_kld.figures.source import places_of

if TYPE_CHECKING:
    from pytest_kld.figures.scores import Scores

BINS_PER_DECADE = 8
SMALLEST = 1e-9
"""Nats; smaller values are counted but not drawn, so that a few exact zeros do not stretch an axis."""
_SURVIVAL_POINTS = 120
_TEXT_BINS = 200
_GAP_BINS = 256
"""Narrow enough to show at which position a kernel changes."""


def profile_of(scores: Scores) -> dict[str, Any]:
    """Describe the distribution of KL over values and over the text, in a few kilobytes for a table of any size.

    Returns:
        Plain data; KL in nats, over the positions that are finite on both sides:
        `histogram`: `[lower, upper, count]` of each bin that is not empty; a bin is an eighth of a decade;
        `below`: the number of positions with less than `SMALLEST`; they are in no bin;
        `survival`: `[kl, share]` by decreasing kl: exactly this share of the positions has at least this KL;
        `text`: `[start, stop, mean, max]` of stretches of the text, in tokens from its start, each position counted
        once for every window that it is in; stretches that no window covers are left out;
        `gap`: `[position, candidate, reference]` of stretches of the window: how far decoding departs from prefill on
        each side, the mean of KL(prefill ‖ decode); empty unless both paths were measured;
        `windows`: `[mean, max]` of each window, or None if it has no valid position.

    """
    kl = scores.columns["kl"]
    valid = ~np.isnan(kl)
    return {
        "histogram": _histogram(kl[valid]),
        "below": int((kl[valid] < SMALLEST).sum()),
        "survival": _survival(np.sort(kl[valid])[::-1]),
        "text": _along_text(kl, valid, places_of(scores)),
        "gap": _gap(scores),
        "windows": [_mean_and_max(row[keep]) for row, keep in zip(kl, valid, strict=True)],
    }


def _histogram(kl: NDArray[np.float64]) -> list[list[float]]:
    drawn = kl[(kl >= SMALLEST) & np.isfinite(kl)]
    steps = np.floor(np.log10(drawn) * BINS_PER_DECADE).astype(int)
    bins, counts = np.unique(steps, return_counts=True)
    return [
        [_short(10 ** (step / BINS_PER_DECADE)), _short(10 ** ((step + 1) / BINS_PER_DECADE)), count]
        for step, count in zip(bins.tolist(), counts.tolist(), strict=True)
    ]


def _survival(falling: NDArray[np.float64]) -> list[list[float]]:
    ranks = np.unique(np.geomspace(1, falling.size, _SURVIVAL_POINTS).round().astype(int))
    return [[_short(falling[rank - 1]), _short(rank / falling.size)] for rank in ranks]


def _along_text(kl: NDArray[np.float64], valid: NDArray[np.bool_], places: NDArray[np.int64]) -> list[list[float]]:
    length = int(places.max()) + 1
    bins = min(_TEXT_BINS, length)
    which = places[valid] * bins // length
    counts = np.bincount(which, minlength=bins)
    sums = np.bincount(which, weights=kl[valid], minlength=bins)
    largest = np.zeros(bins)
    np.maximum.at(largest, which, kl[valid])
    return [
        [-(-length * i // bins), -(-length * (i + 1) // bins), _short(sums[i] / counts[i]), _short(largest[i])]
        for i in np.flatnonzero(counts).tolist()
    ]


def _gap(scores: Scores) -> list[list[float | None]]:
    if GAP_COLUMNS[0] not in scores.columns:
        return []
    size = scores.columns[GAP_COLUMNS[0]].shape[1]
    edges = np.unique(np.linspace(0, size, min(size, _GAP_BINS) + 1).astype(int)).tolist()
    return [
        [scores.first_position + start, *(_mean_known(scores.columns[name][:, start:stop]) for name in GAP_COLUMNS)]
        for start, stop in pairwise(edges)
    ]


def _mean_known(gap: NDArray[np.float64]) -> float | None:
    known = gap[~np.isnan(gap)]
    return _short(known.mean()) if known.size else None


def _mean_and_max(kl: NDArray[np.float64]) -> list[float] | None:
    return [_short(kl.mean()), _short(kl.max())] if kl.size else None


def _short(number: float) -> float:
    """Round to six digits, which is more than a chart shows."""
    return float(f"{number:.6g}")
