"""Limits, the verdict on a summary, and the words of a failure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.errors import ScoresError

if TYPE_CHECKING:
    from pytest_kld.interval import Interval

State = Literal["pass", "fail", "inconclusive"]

BANDS = ((0.01, "near-lossless"), (0.05, "good"), (0.1, "noticeable"), (math.inf, "significant"))
"""Mean KL in nats below which quantization quality is called that, by the usual interpretation scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One kind of limit: marker argument `name`, option `--kld-name`, ini key `kld_name`.

    Attributes:
        name: e.g. `max_mean`; `max_…` bounds from above, `min_…` from below.
        figure: the attribute of `Summary` that it bounds.
        label: how tables and messages call the figure.
        unit: of the figure and the bound; empty for counts and ratios.
        greatest: the largest value that makes sense as a bound.
        integer: whether the figure is a count.
        default: the bound where nobody sets one; None means no limit.
        extended: whether the figure takes the second pass of `--kld-metrics=all`.

    """

    name: str
    figure: str
    label: str
    unit: str = ""
    greatest: float = math.inf
    integer: bool = False
    default: float | None = None
    extended: bool = False

    @property
    def upper(self) -> bool:
        """Whether the figure must not be greater than the bound (else: not less)."""
        return self.name.startswith("max_")

    def parse(self, value: object) -> float:
        """Check a bound, given as a number or as text, and return it.

        Raises:
            ValueError: not a number, or out of range; the text names the value and what is valid.

        """
        kind = "a whole number" if self.integer else "a number"
        upper = "" if math.isinf(self.greatest) else f" and at most {self.greatest:g}"
        wanted = f"expected {kind} of at least 0{upper}, got {value!r}"
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(wanted)
        try:
            number = float(value)
        except ValueError:
            raise ValueError(wanted) from None
        if not 0 <= number <= self.greatest or math.isinf(number) or (self.integer and number != int(number)):
            raise ValueError(wanted)
        return number


LIMITS: Mapping[str, Limit] = {
    limit.name: limit
    for limit in (
        Limit(name="max_mean", figure="mean", label="mean KLD", unit="nats"),
        Limit(name="max_median", figure="median", label="median KLD", unit="nats"),
        Limit(name="max_p95", figure="p95", label="P95 KLD", unit="nats"),
        Limit(name="max_p99", figure="p99", label="P99 KLD", unit="nats"),
        Limit(name="max_p999", figure="p999", label="P99.9 KLD", unit="nats"),
        Limit(name="max_max", figure="max", label="max KLD", unit="nats"),
        Limit(name="max_nan", figure="candidate_nan_count", label="candidate NaN count", integer=True, default=0),
        Limit(
            name="max_ref_nan",
            figure="reference_nan_count",
            label="reference NaN count",
            integer=True,
            default=0,
        ),
        Limit(name="min_top1", figure="top1_agreement", label="top-1 agreement", greatest=1),
        Limit(name="max_ppl_ratio", figure="ppl_ratio", label="perplexity ratio"),
        Limit(name="max_log_ppl_ratio", figure="log_ppl_ratio", label="ln PPL ratio", unit="nats"),
        Limit(name="max_rms_delta_p", figure="rms_delta_p", label="RMS delta p", greatest=1),
        Limit(name="max_flips", figure="flips", label="share of flips", greatest=1),
        Limit(name="max_reverse_kl", figure="reverse_kl", label="mean reverse KLD", unit="nats", extended=True),
        Limit(
            name="max_js",
            figure="js",
            label="mean Jensen-Shannon divergence",
            unit="nats",
            greatest=math.log(2),
            extended=True,
        ),
        Limit(name="max_tv", figure="tv", label="mean total variation", greatest=1, extended=True),
        Limit(name="min_top5", figure="top5_overlap", label="top-5 overlap", greatest=1, extended=True),
        Limit(
            name="max_entropy_difference",
            figure="abs_entropy_difference",
            label="mean absolute entropy difference",
            unit="nats",
            extended=True,
        ),
    )
}
"""Every limit there is, by name."""

DEFAULT_BOUNDS: Mapping[str, float] = {
    name: limit.default for name, limit in LIMITS.items() if limit.default is not None
}


def parse_marker(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, float | None]:
    """Check the arguments of one `kld` marker. None lifts a limit set further out.

    Raises:
        ValueError: a positional, unknown or badly typed argument; the text names the valid ones.

    """
    valid = ", ".join(LIMITS)
    if args:
        raise ValueError(f"the kld marker takes keyword arguments only ({valid}), got {args[0]!r}")
    if unknown := [name for name in kwargs if name not in LIMITS]:
        raise ValueError(f"the kld marker has no argument {unknown[0]!r}; valid are {valid}")
    bounds: dict[str, float | None] = {}
    for name, value in kwargs.items():
        try:
            bounds[name] = None if value is None else LIMITS[name].parse(value)
        except ValueError as error:
            raise ValueError(f"kld marker, {name}: {error}") from None
    return bounds


def merge_bounds(*layers: Mapping[str, float | None]) -> dict[str, float]:
    """Combine layers of bounds, the strongest first; a limit is taken from the first layer that mentions it."""
    merged: dict[str, float | None] = {}
    for layer in layers:
        merged = {**layer, **merged}
    return {name: merged[name] for name in LIMITS if merged.get(name) is not None}  # type: ignore[misc]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One limit held against one figure.

    Attributes:
        limit: the limit.
        value: the figure.
        bound: what it must not go beyond.
        dataset: the dataset that it is of; None: of all.
        interval: the figure's confidence interval; None holds the figure itself against the bound.
        windows: the windows that it was measured on.

    """

    limit: Limit
    value: float
    bound: float
    dataset: str | None = None
    interval: Interval | None = None
    windows: int = 0

    @property
    def state(self) -> State:
        """`pass` where the whole interval is within the bound, `fail` where none of it is. NaN never is within."""
        if self.interval is None:
            return "pass" if self._within(self.value) else "fail"
        low, high = self.interval.low, self.interval.high
        best, worst = (low, high) if self.limit.upper else (high, low)
        if self._within(worst):
            return "pass"
        return "inconclusive" if self._within(best) else "fail"

    @property
    def passed(self) -> bool:
        """Whether the state is `pass`."""
        return self.state == "pass"

    @property
    def more_windows(self) -> int | None:
        """Return how many more windows would probably decide the limit; None if too many or none."""
        if self.interval is None or self.state != "inconclusive":
            return None
        times = self.interval.times_the_text(self.value, self.bound)
        return None if times is None else max(1, math.ceil((times - 1) * self.windows))

    def __str__(self) -> str:
        """Name the limit, the value and the margin, on one line."""
        unit = f" {self.limit.unit}" if self.limit.unit else ""
        sign = {(True, True): "<=", (True, False): ">", (False, True): ">=", (False, False): "<"}
        within = self._within(self.value)
        relation = sign[self.limit.upper, within]
        margin = abs(self.value - self.bound)
        times = f", {self.value / self.bound:.2f}x the limit" if self.bound and not within else ""
        word = "within by" if within else "over by" if self.limit.upper else "short by"
        value, bound, margin_text = (self._format(x) for x in (self.value, self.bound, margin))
        label = f"{self.limit.label} on {self.dataset}" if self.dataset else self.limit.label
        return (
            f"{label} {value}{unit}{self._interval_text()} {relation} {self.limit.name} {bound} "
            f"({word} {margin_text}{times}){self._outlook()}"
        )

    def _within(self, value: float) -> bool:
        return value <= self.bound if self.limit.upper else value >= self.bound

    def _interval_text(self) -> str:
        if self.interval is None:
            return ""
        low, high = self._format(self.interval.low), self._format(self.interval.high)
        return f" [{low}, {high}]"

    def _outlook(self) -> str:
        if self.state != "inconclusive":
            return ""
        more = self.more_windows
        if more is None:
            return "; too close to the limit for any sensible number of windows"
        return f"; about {more:,} more windows would probably settle it"

    def _format(self, number: float) -> str:
        return f"{number:,.0f}" if self.limit.integer else f"{number:.6g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Every limit of one test, held against one candidate's figures."""

    checks: tuple[Check, ...]

    @property
    def state(self) -> State:
        """`fail` where any check fails, else `inconclusive` where any is, else `pass`."""
        states = {check.state for check in self.checks}
        return "fail" if "fail" in states else "inconclusive" if "inconclusive" in states else "pass"

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit."""
        return self.state == "pass"

    @property
    def decided(self) -> bool:
        """Whether no check is inconclusive."""
        return all(check.state != "inconclusive" for check in self.checks)

    def explain(self, candidate: str, reference: str, figures: Mapping[str, Any]) -> str:
        """Tell which limits were exceeded, by how much, and which were not."""
        by_state = {
            state: [check for check in self.checks if check.state == state]
            for state in ("fail", "inconclusive", "pass")
        }
        exceeded, undecided = len(by_state["fail"]), len(by_state["inconclusive"])
        headline = "within all limits"
        if exceeded:
            headline = f"{exceeded} of {len(self.checks)} KLD limits exceeded"
        elif undecided:
            headline = f"{undecided} of {len(self.checks)} KLD limits inconclusive"
        confidence = next(
            (f" at confidence {check.interval.confidence:g}" for check in self.checks if check.interval), ""
        )
        lines = [
            f"{headline}{confidence}: {candidate} against {reference}, {figures['positions']:,} positions",
            *(f"  FAIL  {check}" for check in by_state["fail"]),
            *(f"  ?     {check}" for check in by_state["inconclusive"]),
            *(f"  ok    {check}" for check in by_state["pass"]),
        ]
        if figures["infinite_count"]:
            lines.append(
                f"  note  KLD is infinite at {figures['infinite_count']:,} positions: the candidate rules out tokens "
                "that the reference deems possible"
            )
        return "\n".join(lines)


def judge(
    figures: Mapping[str, Any],
    bounds: Mapping[str, float],
    dataset: str | None = None,
    *,
    intervals: Mapping[str, Interval] | None = None,
    windows: int = 0,
) -> Verdict:
    """Hold figures (by the names of `Summary`) against bounds (by the names of `LIMITS`).

    Args:
        figures: every figure.
        bounds: the limits.
        dataset: the dataset that they are of; None: of all.
        intervals: confidence intervals by the figures' names; a figure without one is held as it is.
        windows: the windows that the figures are of.

    Raises:
        ScoresError: a figure that has a limit is missing.

    """
    checks = []
    for name, bound in bounds.items():
        limit = LIMITS[name]
        value = figures[limit.figure]
        if value is None:
            raise ScoresError(f"{name} cannot be checked: {why_missing(limit.figure)}")
        interval = (intervals or {}).get(limit.figure)
        checks.append(Check(limit=limit, value=value, bound=bound, dataset=dataset, interval=interval, windows=windows))
    return Verdict(checks=tuple(checks))


def needs_extended(bounds: Mapping[str, float]) -> bool:
    """Tell whether a limit is on a figure that takes the second pass."""
    return any(LIMITS[name].extended for name in bounds)


def why_missing(figure: str) -> str:
    """Say why a figure is None."""
    if figure == "flips":
        return "the reference is confident at no position, so there are no flips to count"
    return f"the figure {figure} was not computed; give --kld-metrics=all"


def band(mean: float) -> str:
    """Return the word for a mean KL in nats on the usual interpretation scale."""
    return next((word for bound, word in BANDS if mean < bound), "significant" if mean > 0 else "unknown")


class Figure(float):
    """A figure that knows its name, so that a failed `assert kld.mean < 0.05` explains itself."""

    __slots__ = ("label", "pair", "unit")
    label: str
    pair: str
    unit: str

    def __new__(cls, value: float, *, label: str, unit: str, pair: str) -> Figure:
        """Make a float that carries its label, unit, and the pair it belongs to."""
        figure = super().__new__(cls, value)
        figure.label, figure.unit, figure.pair = label, unit, pair
        return figure

    def explain(self, operator: str, other: float) -> list[str]:
        """Return the lines that pytest shows under a failed comparison."""
        unit = f" {self.unit}" if self.unit else ""
        return [
            f"{float(self):.6g} {operator} {float(other):.6g}",
            f"{self.label} of {self.pair} is {float(self):.6g}{unit}, "
            f"{abs(self - other):.6g} away from {float(other):.6g}",
        ]


_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def explain_comparison(operator: str, left: object, right: object) -> list[str] | None:
    """Explain a failed comparison of a figure with a number, on either side; None where there is none."""
    if isinstance(left, Figure) and isinstance(right, int | float):
        return left.explain(operator, right)
    if isinstance(right, Figure) and isinstance(left, int | float) and operator in _MIRRORED:
        return right.explain(_MIRRORED[operator], left)
    return None
