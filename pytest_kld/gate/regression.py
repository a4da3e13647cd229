"""Regressions: how far a figure may fall behind an earlier result, and whether it did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.gate.floor import NOT_TOLD, Floor, is_below
from pytest_kld.gate.limits import LIMITS, Limit
from pytest_kld.gate.number import decimal_number, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_kld.figures.interval import Interval

FIGURES: Mapping[str, Limit] = {limit.name.partition("_")[2]: limit for limit in LIMITS.values()}
"""Every figure that may be held against an earlier one, by the name of its limit without `max_` or `min_`."""
SHOWN = ("mean", "p99", "top1")
"""Figures whose change is shown even if nothing bounds it."""
CONFIDENCE = 0.95
"""Confidence of the interval of a difference if the session has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How far one figure may fall behind: above the earlier one, or below it for figures with a lower limit.

    Attributes:
        figure: a name in `FIGURES`.
        amount: in the figure's unit, or a share of the earlier figure.
        relative: whether it is a share.

    """

    figure: str
    amount: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """Parse `FIGURE:AMOUNT` or `FIGURE:SHARE%`.

        Raises:
            ValueError: the figure is unknown, or the amount is not a number of at least 0.

        """
        figure, colon, amount = text.partition(":")
        figure = figure.strip().replace("-", "_")
        if figure not in FIGURES or not colon:
            raise ValueError(
                f"expected FIGURE:AMOUNT such as mean:5% or p99:0.01, with a figure of {', '.join(FIGURES)}, got "
                f"{shown(text)}"
            )
        relative = amount.strip().endswith("%")
        number = decimal_number(amount.strip().removesuffix("%"))
        if number is None or not 0 <= number < math.inf:
            raise ValueError(f"{figure}: expected a number of at least 0, or a percentage, got {shown(amount)}")
        return cls(figure=figure, amount=number / 100 if relative else number, relative=relative)

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.figure}:{self.amount * 100:g}%" if self.relative else f"{self.figure}:{self.amount:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure beside the earlier one.

    Attributes:
        limit: the limit of the figure; it has the label, the unit, and the direction that is worse.
        before: the earlier figure.
        value: the figure now.
        allowance: how far it may fall behind; None if nothing bounds it.
        interval: the confidence interval of the difference, from the differences at the same positions; None if the
            scores of both are not at hand, or if the figure has none.
        decides: whether the interval is compared with the bound, and not the difference itself.
        floor: the figure's run-to-run noise now, see `Floor.of`; None if it was not measured.

    """

    limit: Limit
    before: float
    value: float
    allowance: Allowance | None = None
    interval: Interval | None = None
    decides: bool = False
    floor: float | None = None

    @property
    def difference(self) -> float:
        """Return the figure minus the earlier one; 0 if both are infinite."""
        return 0.0 if self.value == self.before else self.value - self.before

    @property
    def share(self) -> float | None:
        """Return the difference as a share of the earlier figure; None if that is 0 or infinite."""
        return self.difference / self.before if self.before and math.isfinite(self.before) else None

    @property
    def bound(self) -> float | None:
        """Return the greatest loss that is allowed, in the figure's unit."""
        if self.allowance is None:
            return None
        scale = abs(self.before) if self.allowance.relative else 1.0
        return self.allowance.amount * scale if self.allowance.amount else 0.0

    @property
    def state(self) -> Literal["pass", "fail", "inconclusive"]:
        """`pass` if the loss is within the bound, or nothing bounds it. NaN is never within the bound."""
        if self.bound is None:
            return "pass"
        if self.interval is None or not self.decides:
            return "pass" if self._loss(self.difference) <= self.bound else "fail"
        best, worst = sorted((self._loss(self.interval.low), self._loss(self.interval.high)))
        return "pass" if worst <= self.bound else "inconclusive" if best <= self.bound else "fail"

    @property
    def below_floor(self) -> bool:
        """Whether the difference is below twice the floor."""
        return is_below(self.difference, self.floor)

    @property
    def beyond_floor(self) -> str | None:
        """Return in words that the floor is above the greatest loss that is allowed; None if it is not."""
        if self.floor is None or self.bound is None or self.floor <= self.bound:
            return None
        return f"{self.limit.label} {self.floor:.6g}, and max_regression {self.allowance} allows {self.bound:.6g}"

    def _loss(self, difference: float) -> float:
        return difference if self.limit.upper else -difference

    def __str__(self) -> str:
        """Name both figures, their difference and what is allowed, on one line."""
        unit = f" {self.limit.unit}" if self.limit.unit else ""
        share = "" if self.share is None else f", {self.share:+.1%}"
        known = "" if self.interval is None else f" [{self.interval.low:+.6g}, {self.interval.high:+.6g}]"
        text = f"{self.limit.label} {self._format(self.value)}{unit}, baseline {self._format(self.before)}: "
        text += f"{self.difference:+.6g}{known}{share}"
        if self.below_floor:
            text += f", below twice the floor of {self.floor:.6g}: {NOT_TOLD}"
        if self.allowance is None or self.bound is None:
            return text
        word = {"pass": "within", "fail": "beyond", "inconclusive": "undecided at"}[self.state]
        return f"{text}; {word} max_regression {self.allowance} ({self.bound:.6g}{unit})"

    def _format(self, number: float) -> str:
        return f"{number:,.0f}" if self.limit.integer else f"{number:.6g}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "figure": self.limit.figure,
            "label": self.limit.label,
            "before": self.before,
            "value": self.value,
            "difference": self.difference,
            "share": self.share,
            "interval": None if self.interval is None else self.interval.to_json(),
            "allowed": None if self.allowance is None else str(self.allowance),
            "bound": self.bound,
            "state": self.state,
            "floor": self.floor,
            "below_floor": self.below_floor,
            "text": str(self),
        }


def changes(
    before: Mapping[str, Any],
    figures: Mapping[str, Any],
    allowances: tuple[Allowance, ...],
    *,
    intervals: Mapping[str, Interval] | None = None,
    decides: bool = False,
    floor: Floor | None = None,
) -> tuple[Change, ...]:
    """Return the change of each figure that is shown or bounded.

    Args:
        before: the earlier figures, named as in `Summary`.
        figures: the figures now.
        allowances: how far each may fall behind.
        intervals: intervals of differences by figure.
        decides: whether intervals are compared with the bounds.
        floor: what two runs of each side differ by now, if that was measured.

    Raises:
        ValueError: a bounded figure is missing on a side; the message says which.

    """
    bounded = {allowance.figure: allowance for allowance in allowances}
    found = []
    for name in dict.fromkeys((*SHOWN, *bounded)):
        limit, allowance = FIGURES[name], bounded.get(name)
        earlier, now = before.get(limit.figure), figures.get(limit.figure)
        if earlier is None or now is None:
            if allowance is None:
                continue
            side = "the baseline" if earlier is None else "this result"
            raise ValueError(f"max_regression {allowance} cannot be checked: {side} has no {limit.label}")
        found.append(
            Change(
                limit=limit,
                before=earlier,
                value=now,
                allowance=allowance,
                interval=(intervals or {}).get(limit.figure),
                decides=decides,
                floor=None if floor is None else floor.of(limit),
            )
        )
    return tuple(found)
