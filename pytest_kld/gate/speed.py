"""The verdict on served speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import ServerError
from pytest_kld.gate.speed_limits import SPEED_LIMITS, SpeedLimit
from pytest_kld.throughput.devices import kinds
from pytest_kld.throughput.figures import MedianInterval, median_interval, ratio_interval

if TYPE_CHECKING:
    from pytest_kld.gate.verdict import State


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedCheck:
    """The comparison of one figure at one concurrency with its bound.

    Attributes:
        limit: the limit.
        concurrency: the number of open requests.
        value: the median over rounds, or the ratio of two such medians.
        bound: the bound.
        base: whose figure a ratio is taken to; None if the limit is absolute.
        interval: the confidence interval of `value`; None compares the value itself.
        rounds: how many rounds were measured.

    """

    limit: SpeedLimit
    concurrency: int
    value: float
    bound: float
    base: str | None = None
    interval: MedianInterval | None = None
    rounds: int

    @property
    def state(self) -> State:
        """`pass` if the whole interval is within the bound, `fail` if none of it is."""
        if self.interval is None:
            return "pass" if self._within(self.value) else "fail"
        ends = (self.interval.low, self.interval.high)
        best, worst = ends if self.limit.upper else ends[::-1]
        return "pass" if self._within(worst) else "inconclusive" if self._within(best) else "fail"

    def __str__(self) -> str:
        """Name the limit, the value and the bound, on one line."""
        unit = f" {self.limit.unit}" if self.limit.unit else ""
        over = f" over {self.base}" if self.base else ""
        sign = {(True, True): "<=", (True, False): ">", (False, True): ">=", (False, False): "<"}
        relation = sign[self.limit.upper, self._within(self.value)]
        text = (
            f"{self.limit.label}{over} at concurrency {self.concurrency} {self.value:.4g}{unit}{self._interval_text()} "
            f"{relation} {self.limit.name} {self.bound:g}"
        )
        if self.interval is not None and self.interval.least_rounds:
            text += (
                f"; too few rounds for confidence {self.interval.confidence:g}: at least {self.interval.least_rounds} "
                f"are needed, and there are {self.rounds}"
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "limit": self.limit.name,
            "figure": self.limit.figure,
            "concurrency": self.concurrency,
            "value": self.value,
            "bound": self.bound,
            "base": self.base,
            "state": self.state,
            "interval": None if self.interval is None else asdict(self.interval),
            "text": str(self),
        }

    def _within(self, value: float) -> bool:
        return value <= self.bound if self.limit.upper else value >= self.bound

    def _interval_text(self) -> str:
        if self.interval is None or math.isinf(self.interval.high):
            return ""
        return f" [{self.interval.low:.4g}, {self.interval.high:.4g}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedVerdict:
    """The comparison of one candidate's speed with all of its limits.

    Attributes:
        candidate: the candidate's measurement, see `throughput.runner.measure`.
        base: the measurement that ratios are taken to; None if there is none.
        base_label: its Subject's label.
        checks: one for each limit and concurrency.

    """

    candidate: Mapping[str, Any]
    base: Mapping[str, Any] | None
    base_label: str
    checks: tuple[SpeedCheck, ...]

    @property
    def state(self) -> State:
        """`fail` if any check fails, else `inconclusive` if any check is, else `pass`."""
        states = {check.state for check in self.checks}
        return "fail" if "fail" in states else "inconclusive" if "inconclusive" in states else "pass"

    def explain(self, label: str) -> str:
        """Describe which limits hold and which do not."""
        words = {"fail": "FAIL", "inconclusive": "?   ", "pass": "ok  "}
        exceeded = sum(check.state == "fail" for check in self.checks)
        undecided = sum(check.state == "inconclusive" for check in self.checks)
        headline = "within all limits on speed"
        if exceeded:
            headline = f"{exceeded} of {len(self.checks)} limits on speed exceeded"
        elif undecided:
            headline = f"{undecided} of {len(self.checks)} limits on speed inconclusive"
        ordered = sorted(self.checks, key=lambda check: list(words).index(check.state))
        return "\n".join([f"{headline}: {label}", *(f"  {words[check.state]}  {check}" for check in ordered)])

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "candidate": dict(self.candidate),
            "base": None if self.base is None else dict(self.base),
            "base_label": self.base_label,
            "checks": [check.to_json() for check in self.checks],
        }


def judge_speed(
    candidate: Mapping[str, Any],
    bounds: Mapping[str, Mapping[int, float]],
    *,
    base: Mapping[str, Any] | None,
    base_label: str,
    confidence: float | None,
) -> SpeedVerdict:
    """Hold a candidate's speed against its limits.

    Args:
        candidate: its measurement.
        bounds: for each limit the bound at each concurrency.
        base: the measurement that a speedup is taken to.
        base_label: its Subject's label.
        confidence: the level of the intervals that are compared with the bounds; None compares the medians.

    Raises:
        ServerError: a speedup is bounded, but its base was not measured, or ran on other devices.

    """
    checks = []
    for name, at in bounds.items():
        limit = SPEED_LIMITS[name]
        if limit.relative and at:
            _require_comparable(candidate, base, base_label)
        for concurrency, bound in sorted(at.items()):
            values = _rounds(candidate, concurrency, limit.figure)
            value, interval = _figure(candidate, concurrency, limit.figure), None
            if limit.relative:
                assert base is not None
                value /= _figure(base, concurrency, limit.figure)
                if confidence is not None:
                    interval = ratio_interval(values, _rounds(base, concurrency, limit.figure), confidence)
            elif confidence is not None:
                interval = median_interval(values, confidence)
            checks.append(
                SpeedCheck(
                    limit=limit,
                    concurrency=concurrency,
                    value=value,
                    bound=bound,
                    base=base_label if limit.relative else None,
                    interval=interval,
                    rounds=len(values),
                )
            )
    return SpeedVerdict(candidate=candidate, base=base, base_label=base_label, checks=tuple(checks))


def _require_comparable(candidate: Mapping[str, Any], base: Mapping[str, Any] | None, base_label: str) -> None:
    if base is None:
        raise ServerError(
            f"min_speedup needs the speed of {base_label}, which was not measured: it is a capture, or another engine "
            "than a server runs it. Name another Subject with --kld-speedup-over"
        )
    ours, theirs = kinds(candidate["devices"]), kinds(base["devices"])
    if ours != theirs:
        raise ServerError(
            f"min_speedup compares speeds on the same devices only, but the candidate ran on {', '.join(ours)} and "
            f"{base_label} on {', '.join(theirs)}"
        )


def _cell(measured: Mapping[str, Any], concurrency: int) -> Mapping[str, Any]:
    cells: Sequence[Mapping[str, Any]] = measured["cells"]
    return next(cell for cell in cells if cell["concurrency"] == concurrency)


def _figure(measured: Mapping[str, Any], concurrency: int, figure: str) -> float:
    return float(_cell(measured, concurrency)["figures"][figure])


def _rounds(measured: Mapping[str, Any], concurrency: int, figure: str) -> list[float]:
    return [float(one[figure]) for one in _cell(measured, concurrency)["rounds"]]
