"""How far two candidates are from each other, directly: the figures of a pair that are the same for both sides.

KL is not symmetric, so both directions are given. The KLDs of the two candidates to the reference may agree even if the
candidates do not: each may depart from the reference in its own way. Only a direct comparison shows that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_kld.errors import ScoresError
from pytest_kld.figures.paired import paired_intervals
from pytest_kld.figures.scores import Summary, valid_positions
from pytest_kld.figures.uncertainty import intervals, macro_average

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_kld.figures.interval import Interval
    from pytest_kld.figures.scores import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """KL in one direction, in nats.

    Attributes:
        mean: the mean over the valid positions; with several datasets the macro average.
        p99: its 99 % quantile, likewise.
        max: its largest value.
        interval: the confidence interval of the mean; None without a confidence.

    """

    mean: float
    p99: float
    max: float
    interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """The figures of two candidates beside each other.

    Attributes:
        forth: KL(first ‖ second).
        back: KL(second ‖ first).
        disagreement: share of the valid positions at which their most probable tokens differ, in [0, 1]; with several
            datasets the macro average.
        positions: the valid positions, at which both are finite.
        not_finite: the other positions.
        difference: mean KLD of the first to the reference minus that of the second, in nats, over the positions at
            which all three are finite; with several datasets the macro average.
        difference_interval: its confidence interval, from the differences at the same positions.
        datasets: both directions in each of several datasets, by its name; else empty.

    """

    forth: Direction
    back: Direction
    disagreement: float
    positions: int
    not_finite: int
    difference: float
    difference_interval: Interval
    datasets: Mapping[str, tuple[Direction, Direction]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def between(pair: Scores, first: Scores, second: Scores, *, confidence: float | None, of_difference: float) -> Between:
    """Compute the figures of two candidates.

    Args:
        pair: the scores of the first (as reference) and the second (as candidate), with the extended columns.
        first: the scores of the reference and the first candidate, of the same positions.
        second: the scores of the reference and the second candidate.
        confidence: the level of the intervals of both mean KLs, e.g. 0.95; None: none.
        of_difference: the level of the interval of the difference.

    Raises:
        ScoresError: the tables are not of the same positions, or at none of them both candidates are finite.

    """
    if not np.array_equal(pair.columns["token_ids"], first.columns["token_ids"]):
        raise ScoresError("the candidates were compared with the reference on other tokens than with each other")
    known = paired_intervals(first, second, of_difference)
    tables = pair.by_dataset()
    forth = list(tables.values())
    back = [replace(one, columns={**one.columns, "kl": one.columns["reverse_kl"]}) for one in forth]
    each = [
        (_direction([one], confidence), _direction([other], confidence)) for one, other in zip(forth, back, strict=True)
    ]
    valid = valid_positions(pair)
    return Between(
        forth=_direction(forth, confidence),
        back=_direction(back, confidence),
        disagreement=1 - _average(forth).top1_agreement,
        positions=int(valid.sum()),
        not_finite=int((~valid).sum()),
        difference=_difference(first, second),
        difference_interval=known["mean"],
        datasets=dict(zip(tables, each, strict=True)) if len(each) > 1 else {},
    )


def _direction(tables: Sequence[Scores], confidence: float | None) -> Direction:
    summary = _average(tables)
    interval = None
    if confidence is not None:
        parts = [intervals(table, confidence, names=("mean",)) for table in tables]
        summaries = [Summary.of(table) for table in tables]
        interval = (parts[0] if len(parts) == 1 else macro_average(parts, summaries))["mean"]
    return Direction(mean=summary.mean, p99=summary.p99, max=summary.max, interval=interval)


def _average(tables: Sequence[Scores]) -> Summary:
    summaries = [Summary.of(table) for table in tables]
    return summaries[0] if len(summaries) == 1 else Summary.macro_average(summaries)


def _difference(first: Scores, second: Scores) -> float:
    """Return the mean difference of KL, the macro average of several datasets; NaN if it is infinite on both sides."""
    means = []
    for ours, theirs in zip(first.by_dataset().values(), second.by_dataset().values(), strict=True):
        valid = valid_positions(ours) & valid_positions(theirs)
        with np.errstate(invalid="ignore"):
            means.append(float((ours.columns["kl"][valid] - theirs.columns["kl"][valid]).mean()))
    return float(np.mean(means))
