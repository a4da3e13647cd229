"""Paired differences: how two results of the same positions differ, with confidence intervals.

Both are measured on the same text, so what makes a passage hard for both cancels, position by position. The interval
of the mean of the differences is much narrower than the difference of two intervals. The unit is a block of the source
text, as for any mean; see `uncertainty.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pytest_kld.errors import ScoresError
from pytest_kld.figures.scores import labelled_positions, valid_positions
from pytest_kld.figures.uncertainty import FIGURES, Mean, Share, average_interval, intervals

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_kld.figures.interval import Interval
    from pytest_kld.figures.scores import Scores

_UNPAIRED = ("flips", "ppl_ratio", "rms_delta_p")
"""Means over some positions only, and functions of a mean: their differences are not means of differences."""


def paired_intervals(scores: Scores, before: Scores, confidence: float) -> dict[str, Interval]:
    """Return an interval of the difference, now minus before, for each figure that is a plain mean or share.

    Quantiles, the maximum and counts have none. With several datasets it is the interval of the macro average of the
    differences.

    Args:
        scores: the table.
        before: the earlier table.
        confidence: e.g. 0.95.

    Raises:
        ScoresError: the tables are not of the same positions.

    """
    if not np.array_equal(scores.columns["token_ids"], before.columns["token_ids"]):
        raise ScoresError("the earlier scores are of other tokens, so their positions are not the same")
    figures = {
        name: figure
        for name, figure in FIGURES.items()
        if isinstance(figure, Mean | Share)
        and name not in _UNPAIRED
        and not (
            isinstance(figure, Mean) and figure.needs and figure.needs not in scores.columns.keys() & before.columns
        )
    }
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN, and so is the interval
        columns = {name: _values(figure, scores) - _values(figure, before) for name, figure in figures.items()}
    difference = replace(
        scores,
        columns={
            **scores.columns,
            **{f"difference.{name}": column for name, column in columns.items()},
            "kl": columns["mean"],
            "flags": scores.columns["flags"] | before.columns["flags"],
        },
    )
    means = {name: _mean_of(f"difference.{name}", figure) for name, figure in figures.items()}
    tables = list(difference.by_dataset().values())
    parts = [intervals(table, confidence, figures=means, names=means) for table in tables]
    if len(parts) == 1:
        return parts[0]
    return {
        name: average_interval(
            [(part[name], _mean(table, name, mean)) for part, table in zip(parts, tables, strict=True)],
            float(np.mean([_mean(table, name, mean) for table in tables])),
        )
        for name, mean in means.items()
    }


def _values(figure: Mean | Share, scores: Scores) -> NDArray[np.float64]:
    values = figure.values(scores.columns) if isinstance(figure, Mean) else figure.holds(scores.columns)
    return values.astype(np.float64)


def _mean_of(column: str, figure: Mean | Share) -> Mean:
    labelled = isinstance(figure, Mean) and figure.labelled
    return Mean(lambda columns: columns[column], labelled=labelled, least=-math.inf)


def _mean(table: Scores, name: str, mean: Mean) -> float:
    mask = labelled_positions(table) if mean.labelled else valid_positions(table)
    return float(table.columns[f"difference.{name}"][mask].mean())
