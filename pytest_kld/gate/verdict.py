"""The verdict on a summary, and the message of a failure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.errors import FloorError, ScoresError
from pytest_kld.gate.floor import NOT_TOLD, Floor, distance, is_below
from pytest_kld.gate.limits import LIMITS, Limit, why_missing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_kld.figures.interval import Interval
    from pytest_kld.gate.regression import Change

State = Literal["pass", "fail", "inconclusive"]

BANDS = ((0.01, "near-lossless"), (0.05, "good"), (0.1, "noticeable"), (math.inf, "significant"))
"""Upper bounds of the mean KL in nats, and the name of the quality below each, on the usual interpretation scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The comparison of one figure with its limit.

    Attributes:
        limit: the limit.
        value: the figure.
        bound: the value that the figure must not exceed, or not fall below.
        dataset: the dataset that the figure belongs to; None: all datasets.
        interval: the figure's confidence interval; if None, the figure itself is compared with the bound.
        windows: the number of windows that the figure was measured on.
        floor: the figure's run-to-run noise, see `Floor.of`; None if it was not measured.

    """

    limit: Limit
    value: float
    bound: float
    dataset: str | None = None
    interval: Interval | None = None
    windows: int = 0
    floor: float | None = None

    @property
    def state(self) -> State:
        """`pass` if the whole interval is within the bound, `fail` if none of it is. NaN is never within the bound."""
        if self.interval is None:
            return "pass" if self._within(self.value) else "fail"
        low, high = self.interval.low, self.interval.high
        best, worst = (low, high) if self.limit.upper else (high, low)
        if self._within(worst):
            return "pass"
        return "inconclusive" if self._within(best) else "fail"

    @property
    def decides(self) -> bool:
        """Whether the interval, and not the figure, is compared with the bound."""
        return self.interval is not None

    @property
    def passed(self) -> bool:
        """Whether the state is `pass`."""
        return self.state == "pass"

    @property
    def more_windows(self) -> int | None:
        """Return how many more windows would probably decide the limit; None if too many or if it is decided.

        If there are too few windows for an interval, return how many more are needed for one.
        """
        if self.interval is None or self.state != "inconclusive":
            return None
        if self.interval.least_windows is not None:
            return max(1, self.interval.least_windows - self.windows)
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
            f"({word} {margin_text}{times}){self._outlook()}{self._noise_text()}"
        )

    def _within(self, value: float) -> bool:
        return value <= self.bound if self.limit.upper else value >= self.bound

    @property
    def below_floor(self) -> bool:
        """Whether the figure is below twice its floor."""
        return is_below(distance(self.limit, self.value), self.floor)

    @property
    def beyond_floor(self) -> str | None:
        """Return in words that the floor is above the limit; None if it is not."""
        if self.floor is None or self.floor <= distance(self.limit, self.bound):
            return None
        label = f"{self.limit.label} on {self.dataset}" if self.dataset else self.limit.label
        figure, sign = (self.floor, ">") if self.limit.upper else (1 - self.floor, "<")
        return f"{label} {figure:.6g} {sign} {self.limit.name} {self.bound:.6g}"

    def _noise_text(self) -> str:
        return f"; below twice the floor of {self.floor:.6g}: {NOT_TOLD}" if self.below_floor else ""

    def _interval_text(self) -> str:
        if self.interval is None:
            return ""
        low, high = self._format(self.interval.low), self._format(self.interval.high)
        return f" [{low}, {high}]"

    def _outlook(self) -> str:
        if self.interval is None or self.state != "inconclusive":
            return ""
        more = self.more_windows
        if self.interval.least_windows is not None:
            return (
                f"; too few positions for confidence {self.interval.confidence:g}: at least "
                f"{self.interval.least_windows:,} windows are needed, and there are {self.windows:,}"
            )
        if more is None:
            return "; too close to the limit for any sensible number of windows"
        return f"; about {more:,} more windows would probably settle it"

    def _format(self, number: float) -> str:
        return f"{number:,.0f}" if self.limit.integer else f"{number:.6g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The comparison of one candidate's figures with all limits of one test, and with a baseline.

    Attributes:
        checks: one for each limit.
        changes: figures beside those of the baseline; empty without one.

    """

    checks: tuple[Check, ...]
    changes: tuple[Change, ...] = ()

    @property
    def state(self) -> State:
        """`fail` if any check or change fails, else `inconclusive` if any is, else `pass`."""
        states = {one.state for one in self._all}
        return "fail" if "fail" in states else "inconclusive" if "inconclusive" in states else "pass"

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit."""
        return self.state == "pass"

    @property
    def decided(self) -> bool:
        """Whether no check and no change is inconclusive."""
        return all(one.state != "inconclusive" for one in self._all)

    @property
    def _all(self) -> tuple[Check | Change, ...]:
        return (*self.checks, *self.changes)

    def require_finer(self, candidate: str, reference: str) -> None:
        """Refuse limits that are smaller than the noise between runs: the next run could be on their other side.

        Args:
            candidate: the candidate's name.
            reference: the reference's name.

        Raises:
            FloorError: a floor is above a limit; the message names each.

        """
        if beyond := [one.beyond_floor for one in self._all if one.beyond_floor is not None]:
            raise FloorError(
                f"two runs of the same differ by more than a limit allows, so that {candidate} against {reference} can "
                f"neither pass nor fail. Floors: {'; '.join(beyond)}. Make the engine deterministic, or give a limit "
                "above the floor."
            )

    def explain(self, candidate: str, reference: str, figures: Mapping[str, Any]) -> str:
        """Describe which limits were exceeded, by how much, and which were not."""
        told = [one for one in self._all if isinstance(one, Check) or one.allowance is not None]
        by_state = {state: [one for one in told if one.state == state] for state in ("fail", "inconclusive", "pass")}
        exceeded, undecided = len(by_state["fail"]), len(by_state["inconclusive"])
        headline = "within all limits"
        if exceeded:
            headline = f"{exceeded} of {len(told)} KLD limits exceeded"
        elif undecided:
            headline = f"{undecided} of {len(told)} KLD limits inconclusive"
        confidence = next(
            (f" at confidence {one.interval.confidence:g}" for one in told if one.interval and one.decides), ""
        )
        lines = [
            f"{headline}{confidence}: {candidate} against {reference}, {figures['positions']:,} positions",
            *(f"  FAIL  {check}" for check in by_state["fail"]),
            *(f"  ?     {check}" for check in by_state["inconclusive"]),
            *(f"  ok    {check}" for check in by_state["pass"]),
            *(f"  note  {change}" for change in self.changes if change.allowance is None),
        ]
        if figures["infinite_count"]:
            lines.append(
                f"  note  KLD is infinite at {figures['infinite_count']:,} positions: the candidate rules out tokens "
                "that the reference considers possible"
            )
        return "\n".join(lines)


def judge(
    figures: Mapping[str, Any],
    bounds: Mapping[str, float],
    dataset: str | None = None,
    *,
    intervals: Mapping[str, Interval] | None = None,
    windows: int = 0,
    floor: Floor | None = None,
) -> Verdict:
    """Compare figures (named as in `Summary`) with bounds (named as in `LIMITS`).

    Args:
        figures: every figure.
        bounds: the limits.
        dataset: the dataset that the figures belong to; None: all datasets.
        intervals: confidence intervals by the figures' names; a figure without one is compared directly.
        windows: the number of windows that the figures were measured on.
        floor: what two runs of each side differ by, if that was measured.

    Raises:
        ScoresError: a bounded figure is missing.

    """
    checks = []
    for name, bound in bounds.items():
        limit = LIMITS[name]
        value = figures[limit.figure]
        if value is None:
            raise ScoresError(f"{name} cannot be checked: {why_missing(limit.figure)}")
        interval = (intervals or {}).get(limit.figure)
        checks.append(
            Check(
                limit=limit,
                value=value,
                bound=bound,
                dataset=dataset,
                interval=interval,
                windows=windows,
                floor=None if floor is None else floor.of(limit),
            )
        )
    return Verdict(checks=tuple(checks))


def band(mean: float) -> str:
    """Return the name of a mean KL in nats on the usual interpretation scale."""
    return next((word for bound, word in BANDS if mean < bound), "unknown" if math.isnan(mean) else "significant")
