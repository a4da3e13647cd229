"""Confidence intervals of figures; they account for the dependence between neighbours and between overlapping windows.

The unit is a *block*, a stretch of the source text. It contains the positions of all windows that score one of its
tokens. Figures are sums over blocks, so their errors follow from the differences between blocks (the cluster-robust or
sandwich estimator: Liang & Zeger 1986; "batch means" for time series). Sources and formulas: docs/explanation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pytest_kld.figures.interval import Interval
from pytest_kld.figures.scores import CONFIDENT, EXTENDED_COLUMNS, Summary, labelled_positions, valid_positions
from pytest_kld.figures.source import scored_places_of

if TYPE_CHECKING:
    from pytest_kld.figures.scores import Scores

Floats = NDArray[np.float64]
Columns = Mapping[str, NDArray[Any]]

MOST_BLOCKS = 48
"""More and shorter blocks gain little: Student's t with 47 degrees of freedom is 2.6 % wider than the normal."""
FEWEST_BLOCKS = 12
"""With fewer blocks, the uncertainty of its own width dominates an interval. This is the number before blocks are
aligned: with few windows, alignment may leave only half as many."""
_CORRELATION_LENGTHS = 6
"""Blocks are at least this many correlation lengths long; the correlation across their edges is then a few percent of a
variance."""
LEAST_BLOCKS = 5
"""With fewer effective blocks than this there is no interval: the uncertainty of its own width would dominate it."""
RAREST = 0.01
"""A mean has an interval only if the text is long enough to show its rarest positions: this share of all, with the
greatest values. With a heavy tail, they carry a large part of the mean, and a text without them does not reveal it."""
_T_GRID = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The stretches of source text that positions belong to.

    Attributes:
        half_of: [windows, positions], the half block that each position is in; block b has halves 2b and 2b + 1.
        tokens: distinct tokens of the source text.
        length: tokens in a block.
        count: number of blocks.
        window_size: tokens in a window.
        stride: tokens of the scored text between the starts of two neighbouring windows, usually.

    """

    half_of: NDArray[np.int64]
    tokens: int
    length: int
    count: int
    window_size: int
    stride: int

    @classmethod
    def cut(cls, scores: Scores) -> Blocks:
        """Cut the source text into enough blocks, each long enough for the text's correlation."""
        source, stride = scored_places_of(scores)
        tokens, size = int(source.max()) + 1, source.shape[1]
        wanted = max(_CORRELATION_LENGTHS * correlation_length(scores, source), tokens // MOST_BLOCKS)
        half = _align(max(1, min(wanted, tokens // FEWEST_BLOCKS) // 2), stride)
        half_of = source // half
        count = int(half_of.max()) // 2 + 1
        return cls(half_of=half_of, tokens=tokens, length=2 * half, count=count, window_size=size, stride=stride)


@dataclass(frozen=True, slots=True)
class Mean:
    """A figure that is the mean of a value per position, or a function of such a mean.

    Attributes:
        values: columns → [windows, positions].
        transform: an increasing function, mean → figure.
        labelled: whether only positions with a label count.
        needs: a column that the table has only if the figure was requested.
        partial: whether NaN stands for positions at which the figure is unknown; they are left out.
        least: the smallest value that the figure can have.
        greatest: the greatest value that the figure can have.

    """

    values: Callable[[Columns], NDArray[Any]]
    transform: Callable[[float], float] = float
    labelled: bool = False
    needs: str | None = None
    partial: bool = False
    least: float = 0.0
    greatest: float = math.inf

    def least_positions(self, error: float) -> float:
        """Return how many effective positions show the tail, with a failure probability of half the error."""
        return _to_see(RAREST, error)

    def interval(self, sample: _Sample, quantile: float) -> tuple[float, float, float]:
        """Return low, high and effective positions; see `_skewness_corrected`."""
        values, halves = sample.take(self.values, sample.labelled if self.labelled else sample.valid)
        if self.partial and (unknown := np.isnan(values)).any():
            values, halves = values[~unknown], halves[~unknown]
        mean = float(values.mean())
        if not math.isfinite(mean):
            return self.transform(mean), self.transform(mean), 0.0
        error, skewness = _error_of_mean(values, halves, mean)
        low, high = _skewness_corrected(mean, error, skewness, quantile)
        effective = float(values.var()) / error**2 if error else float(sample.blocks.tokens)
        return max(self.transform(low), self.least), min(self.transform(high), self.greatest), effective


@dataclass(frozen=True, slots=True)
class Share:
    """A figure that is a share of the valid positions, or of some of them.

    Attributes:
        holds: columns → [windows, positions], bool.
        among: columns → [windows, positions], bool: which positions count; None: all valid ones.

    """

    holds: Callable[[Columns], NDArray[Any]]
    among: Callable[[Columns], NDArray[Any]] | None = None
    least: ClassVar[float] = 0.0
    greatest: ClassVar[float] = 1.0

    def least_positions(self, error: float) -> float:  # noqa: ARG002 (same signature as the others)
        """Return 1, because Wilson's interval is valid for any number of positions."""
        return 1.0

    def interval(self, sample: _Sample, quantile: float) -> tuple[float, float, float]:
        """Return low, high and effective positions: Wilson's interval at the effective sample size."""
        holds, halves = sample.take(self.holds, sample.among(self.among))
        effective = _effective(holds, halves, sample.blocks.tokens)
        return *_wilson(float(holds.mean()), effective, quantile), effective


@dataclass(frozen=True, slots=True)
class Quantile:
    """A figure that is a quantile of KL.

    Attributes:
        level: in (0, 1).

    """

    level: float
    least: ClassVar[float] = 0.0
    greatest: ClassVar[float] = math.inf

    def least_positions(self, error: float) -> float:
        """Return how many effective positions include one beyond it, with a failure probability of half the error."""
        return _to_see(1 - self.level, error)

    def interval(self, sample: _Sample, quantile: float) -> tuple[float, float, float]:
        """Return low, high and effective positions, by Woodruff's method.

        The share of positions at or below the quantile has an interval like any share; the order statistics at its ends
        bound the quantile. If the upper end is beyond the last order statistic, there is no upper bound.
        """
        kl, halves = sample.take(lambda columns: columns["kl"], sample.valid)
        ordered = sample.ordered_kl()
        n = ordered.size
        below = (kl <= ordered[math.ceil(self.level * n) - 1]).astype(np.float64)
        effective = _effective(below, halves, sample.blocks.tokens)
        low, high = _wilson(self.level, effective, quantile)
        lower, upper = math.floor(low * n) - 1, math.ceil(high * n)
        return (
            float(ordered[lower]) if lower >= 0 else self.least,
            float(ordered[upper]) if upper < n else self.greatest,
            effective,
        )


def _exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)


FIGURES: Mapping[str, Mean | Share | Quantile] = {
    "mean": Mean(lambda columns: columns["kl"]),
    "median": Quantile(0.5),
    "p90": Quantile(0.9),
    "p95": Quantile(0.95),
    "p99": Quantile(0.99),
    "p999": Quantile(0.999),
    "flips": Share(
        lambda columns: columns["reference_argmax"] != columns["candidate_argmax"],
        lambda columns: columns["reference_confidence"] > CONFIDENT,
    ),
    "reverse_kl": Mean(lambda columns: columns["reverse_kl"], needs=EXTENDED_COLUMNS[0]),
    "js": Mean(lambda columns: columns["js"], needs=EXTENDED_COLUMNS[0], greatest=math.log(2)),
    "tv": Mean(lambda columns: columns["tv"], needs=EXTENDED_COLUMNS[0], greatest=1.0),
    "top5_overlap": Mean(lambda columns: columns["top5_overlap"], needs=EXTENDED_COLUMNS[0], greatest=1.0),
    "entropy_difference": Mean(
        lambda columns: columns["entropy_difference"], needs=EXTENDED_COLUMNS[0], least=-math.inf
    ),
    "abs_entropy_difference": Mean(lambda columns: np.abs(columns["entropy_difference"]), needs=EXTENDED_COLUMNS[0]),
    # Unknown where the prefill was not finite.
    "decode_gap": Mean(lambda columns: columns["decode_gap"], needs="decode_gap", partial=True),
    "top1_agreement": Share(lambda columns: columns["reference_argmax"] == columns["candidate_argmax"]),
    "ppl_ratio": Mean(lambda columns: columns["candidate_nll"] - columns["reference_nll"], _exp, labelled=True),
    "log_ppl_ratio": Mean(
        lambda columns: columns["candidate_nll"] - columns["reference_nll"], labelled=True, least=-math.inf
    ),
    "rms_delta_p": Mean(
        lambda columns: (np.exp(-columns["candidate_nll"]) - np.exp(-columns["reference_nll"])) ** 2,
        lambda mean: math.sqrt(max(0.0, mean)),
        labelled=True,
        greatest=1.0,
    ),
}
"""Every figure of `Summary` with an interval. Counts and the maximum have none: they do not apply to other text."""


def intervals(
    scores: Scores,
    confidence: float,
    *,
    spend: float = 1.0,
    names: Collection[str] = FIGURES.keys(),
    figures: Mapping[str, Mean | Share | Quantile] = FIGURES,
) -> dict[str, Interval]:
    """Return a confidence interval for each figure, by its name.

    Args:
        scores: the table of one pair.
        confidence: e.g. 0.95; the interval misses the figure for a share of 1 − confidence of all texts.
        spend: the share of that error that this look at the data may use up. See `schedule.py`.
        names: the requested figures; those without an interval are omitted.
        figures: how each figure is computed from the table.

    If the text has too few blocks or effective positions for a figure, its interval contains all values that the figure
    can take (for a quantile, all values upwards), and gives the smallest number of windows that would suffice.

    """
    sample, error = _Sample(scores), (1 - confidence) * spend
    quantile = student_quantile(1 - error / 2, sample.degrees_of_freedom)
    found = {}
    for name, figure in ((name, figure) for name, figure in figures.items() if name in names and sample.has(figure)):
        low, high, effective = figure.interval(sample, quantile)
        # Infinite positions were seen, and more text cannot change that. The difference of two of them is NaN.
        known = math.isnan(low) or (math.isinf(low) and low == high)
        least = None if known else sample.least_windows(figure.least_positions(error), effective)
        if least is not None:
            # The lower bound of a quantile does not need positions rarer than the quantile.
            low = low if isinstance(figure, Quantile) and sample.has_blocks else figure.least
            high = figure.greatest
        found[name] = Interval(
            low=low, high=high, confidence=confidence, effective_positions=effective, least_windows=least
        )
    return found


def _to_see(share: float, error: float) -> float:
    """Return how many positions include one of this rare share, except in half the error of all cases (Wilks 1941)."""
    return math.log(error / 2) / math.log1p(-share)


def macro_average(parts: Sequence[Mapping[str, Interval]], summaries: Sequence[Summary]) -> dict[str, Interval]:
    """Return the intervals of an average over datasets with equal weights, from the intervals of each dataset.

    Datasets are independent, so the squared distances from the figures to their bounds add up (the method of variance
    estimates recovery, Zou & Donner 2008). If one dataset is too short for an interval, the total number of windows
    needed is the number that this dataset needs times the number of datasets.
    """
    average = Summary.macro_average(summaries)
    return {
        name: average_interval(
            [(part[name], getattr(summary, name)) for part, summary in zip(parts, summaries, strict=True)],
            getattr(average, name),
        )
        for name in set.intersection(*(set(part) for part in parts))
    }


def average_interval(known: Sequence[tuple[Interval, float]], value: float) -> Interval:
    """Return the interval of an average over datasets from the interval and the figure of each. See `macro_average`."""
    least = [interval.least_windows for interval, _ in known if interval.least_windows is not None]
    low, high = _mean_of_ends(known) if least else _recovered_ends(known, value)
    return Interval(
        low=low,
        high=high,
        confidence=known[0][0].confidence,
        effective_positions=sum(interval.effective_positions for interval, _ in known),
        least_windows=len(known) * max(least) if least else None,
    )


def _mean_of_ends(known: Sequence[tuple[Interval, float]]) -> tuple[float, float]:
    """Return bounds that hold for any figures within the datasets' intervals."""
    low, high = (float(np.mean([getattr(interval, end) for interval, _ in known])) for end in ("low", "high"))
    return low, high


def _recovered_ends(known: Sequence[tuple[Interval, float]], value: float) -> tuple[float, float]:
    if not math.isfinite(value):
        return value, value
    low = math.hypot(*(figure - interval.low for interval, figure in known)) / len(known)
    high = math.hypot(*(interval.high - figure for interval, figure in known)) / len(known)
    return value - low, value + high


class _Sample:
    """The data that several figures of one table share."""

    def __init__(self, scores: Scores) -> None:
        self.blocks = Blocks.cut(scores)
        self._columns = scores.columns
        self.valid, self.labelled = valid_positions(scores), labelled_positions(scores)
        self._ordered_kl: Floats | None = None

    @property
    def degrees_of_freedom(self) -> float:
        """The effective number of blocks (Kish 1965), weighted by their valid positions, minus one."""
        return max(1.0, self._effective_blocks - 1)

    @property
    def _effective_blocks(self) -> float:
        sizes = np.bincount(self.blocks.half_of[self.valid] // 2).astype(np.float64)
        return float(sizes.sum() ** 2 / (sizes**2).sum())

    @property
    def has_blocks(self) -> bool:
        """Whether there are enough blocks for any interval."""
        return self._effective_blocks >= LEAST_BLOCKS

    def least_windows(self, positions: float, effective: float) -> int | None:
        """Return the smallest number of windows that a figure needs; None if this text is long enough.

        Args:
            positions: effective positions that the figure needs.
            effective: effective positions that the figure has.

        """
        tokens, size, stride = self.blocks.tokens, self.blocks.window_size, self.blocks.stride
        effective = min(effective, tokens)  # scoring a token again shows nothing new about the tail
        if self.has_blocks and effective >= positions:
            return None
        # Too few blocks do not show how many positions depend on one another: in the best case none do.
        dependence = tokens / effective if self.has_blocks else 1.0
        needed = max(positions * dependence, tokens * LEAST_BLOCKS / self._effective_blocks)
        return max(len(self.blocks.half_of) + 1, 1 + math.ceil((needed - size) / stride))

    def among(self, condition: Callable[[Columns], NDArray[Any]] | None) -> NDArray[np.bool_]:
        """Return which valid positions meet a condition."""
        return self.valid if condition is None else self.valid & condition(self._columns)

    def has(self, figure: Mean | Share | Quantile) -> bool:
        """Tell whether the table has the data that the figure is computed from."""
        if isinstance(figure, Mean) and figure.needs is not None:
            column = self._columns.get(figure.needs)
            return column is not None and not bool(np.isnan(column[self.valid]).all())
        return not isinstance(figure, Share) or bool(self.among(figure.among).any())

    def take(
        self, values: Callable[[Columns], NDArray[Any]], mask: NDArray[np.bool_]
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Return the values [n] at the positions of the mask, and their half blocks [n]."""
        return values(self._columns)[mask].astype(np.float64), self.blocks.half_of[mask]

    def ordered_kl(self) -> Floats:
        """Return valid KL in ascending order."""
        if self._ordered_kl is None:
            self._ordered_kl = np.sort(self._columns["kl"][self.valid])
        return self._ordered_kl


def correlation_length(scores: Scores, source: NDArray[np.int64]) -> int:
    """Return how far, in tokens, KL depends on earlier KL along the source text.

    It is the smallest lag after which five autocorrelations in a row are insignificant, by the rule of Politis & White
    (2004, section 3.2): |ρ| < 2 √(log₁₀ n / n). Ranks are correlated instead of values, so that a few extreme positions
    do not hide the dependence of the others.

    Args:
        scores: the table.
        source: [windows, positions], the source token of each position.

    """
    valid = valid_positions(scores)
    kl, at = scores.columns["kl"][valid], source[valid]
    _, places, equal = np.unique(kl, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(equal) - (equal + 1) / 2)[places]  # equal values share a rank, or their order would count
    counts = np.bincount(at)
    series = np.bincount(at, ranks)[counts > 0] / counts[counts > 0]
    n = series.size
    series -= series.mean()
    power = np.abs(np.fft.rfft(series, 1 << (2 * n - 1).bit_length())) ** 2
    covariances = np.fft.irfft(power)[:n]
    if n < 12 or covariances[0] <= 0:
        return 1
    small = np.abs(covariances / covariances[0]) < 2 * math.sqrt(math.log10(n) / n)
    runs = np.convolve(small[1:], np.ones(5), "valid") == 5
    return int(np.argmax(runs)) + 1 if runs.any() else n


def _align(length: int, stride: int) -> int:
    """Make a block hold whole strides, or a stride whole blocks, to spread window starts evenly over blocks."""
    if length >= stride:
        return stride * round(length / stride)
    return math.ceil(stride / (stride // length))


def _error_of_mean(values: Floats, halves: NDArray[np.int64], mean: float) -> tuple[float, float]:
    """Return the standard error of a mean, and the skewness of the block sums divided by the root of their number.

    The variance of blocks lacks the correlation across their edges, in inverse proportion to their length. Twice the
    variance of the blocks minus that of their halves includes it (the lugsail estimator, Vats & Flegal 2022). The
    larger of the two counts. With a single block the error is unknown: infinite.
    """
    sizes = np.bincount(halves)
    half_sums = np.bincount(halves, values) - sizes * mean
    if half_sums.size % 2:
        half_sums, sizes = np.append(half_sums, 0.0), np.append(sizes, 0)
    sums, count = half_sums.reshape(-1, 2).sum(axis=1), np.count_nonzero(sizes.reshape(-1, 2).any(axis=1))
    squares = float((sums**2).sum())
    if count < 2:
        return math.inf, 0.0
    if squares == 0:
        return 0.0, 0.0
    lugsail = 2 * squares - float((half_sums**2).sum())
    error = math.sqrt(count / (count - 1) * max(squares, lugsail)) / values.size
    return error, float((sums**3).sum()) / squares**1.5


def _skewness_corrected(mean: float, error: float, skewness: float, quantile: float) -> tuple[float, float]:
    """Return the bounds of a mean of a skewed distribution: Hall's (1992) cubic transformation of Student's t.

    Args:
        mean: the mean.
        error: its standard error.
        skewness: γ/√n, the third standardised moment of the mean's error.
        quantile: the quantile of Student's t.

    """

    def invert(x: float) -> float:
        if abs(skewness) < 1e-6:
            return x
        return 3 / skewness * (float(np.cbrt(1 + skewness * (x - skewness / 6))) - 1)

    return mean - error * invert(quantile), mean - error * invert(-quantile)


def _effective(holds: Floats, halves: NDArray[np.int64], tokens: int) -> float:
    """Return how many independent positions would estimate a share equally well."""
    share = float(holds.mean())
    error, _ = _error_of_mean(holds, halves, share)
    return max(1.0, share * (1 - share) / error**2) if error else float(tokens)


def _wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's (1927) interval of a share, which does not collapse at 0 and 1."""
    square = quantile**2 / n
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def student_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return a quantile of Student's t.

    With t = √ν tan θ, its density is proportional to cos^(ν−1) θ, which is summed over a grid.
    """
    theta = np.linspace(0, math.pi / 2, _T_GRID + 1)
    density = np.cos((theta[1:] + theta[:-1]) / 2) ** (degrees_of_freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum(density)])
    angle = np.interp(2 * probability - 1, cumulative / cumulative[-1], theta)
    return math.sqrt(degrees_of_freedom) * math.tan(float(angle))
