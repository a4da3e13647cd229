"""The confidence interval of one figure. Plain data, without numpy; computed in uncertainty.py."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_POWER = 1.43
"""(z₀.₉₇₅ + z₀.₈) / z₀.₉₇₅: if the distance is this many half widths, 4 of 5 samples decide."""
_MOST_TIMES = 100
"""If more than this many times the text would be needed, a figure is called too close to its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A confidence interval of one figure, in the figure's unit.

    Attributes:
        low: the lower bound; it is wrong as often as the upper one.
        high: the upper bound; infinite if the text is too short to give one.
        confidence: the share of texts whose interval contains the figure of all text of this kind.
        effective_positions: the number of independent positions that would give the same uncertainty.
        least_windows: if the text is too short for a bound, the smallest number of windows that would suffice; the
            interval then contains all values that the figure can take (for a quantile, all values upwards). Else None.

    """

    low: float
    high: float
    confidence: float
    effective_positions: float
    least_windows: int | None = None

    def times_the_text(self, value: float, bound: float) -> float | None:
        """Return how many times as much text would probably separate the figure from the bound; None if far too much.

        Half the width shrinks with the square root of the amount of text. If the figure stays the same, the interval of
        that much text ends before the bound with a probability of 80 %.
        """
        half = self.high - value if value <= bound else value - self.low
        distance = abs(value - bound)
        times = (_POWER * half / distance) ** 2 if distance else math.inf
        return times if times <= _MOST_TIMES else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)
