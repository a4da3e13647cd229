"""The confidence interval of one figure. Plain data, without numpy; computed in uncertainty.py."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_POWER = 1.43
"""(z₀.₉₇₅ + z₀.₈) / z₀.₉₇₅: with this much more distance than half a width, 4 of 5 samples decide."""
_MOST_TIMES = 100
"""Beyond so many times the text, a figure is called too close to its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A confidence interval of one figure, in the figure's unit.

    Attributes:
        low: the lower bound; it errs as often as the upper.
        high: the upper bound; infinite if the text is too short to give one.
        confidence: the share of texts for which such an interval holds the figure of all text of this kind.
        effective_positions: independent positions that would leave the figure as uncertain.
        least_windows: if the text is too short for a bound, the least number of windows that would do; the interval
            then has all values that the figure can take (of a quantile, all values upwards). Else None.

    """

    low: float
    high: float
    confidence: float
    effective_positions: float
    least_windows: int | None = None

    def times_the_text(self, value: float, bound: float) -> float | None:
        """Return how many times the text would probably tell the figure from the bound; None if far too many.

        Half a width shrinks with the root of the text; where the figure stays, it should end before the bound
        with a chance of 80 %.
        """
        half = self.high - value if value <= bound else value - self.low
        distance = abs(value - bound)
        times = (_POWER * half / distance) ** 2 if distance else math.inf
        return times if times <= _MOST_TIMES else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)
