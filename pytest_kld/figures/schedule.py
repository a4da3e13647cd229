"""The schedule of adaptive windows: when to look at the data, and how much error each look may spend.

Looking repeatedly and stopping at a favourable result inflates the error rate. So the looks share the error: a look
that raises the number of windows from one share of the maximum to a larger share may spend the difference of the
squared shares (α-spending, Lan & DeMets 1983, with a power function of Kim & DeMets 1987). The differences add up to 1.
By Bonferroni's inequality, all looks together are therefore wrong no more often than 1 − confidence, regardless of how
they depend on each other. The square accounts for the heavy tail: a look at few windows, which may not include any of
the tail, may spend little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kld.text.windows import Windows

MOST_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at the data.

    Attributes:
        windows: the number of windows at this look.
        spend: the share of the error, 1 − confidence, that this look may use up.

    """

    windows: int
    spend: float


def schedule(most: int) -> list[Look]:
    """Return the looks on the way to `most` windows: each round doubles the number of windows.

    There are at most five rounds; the first has a sixteenth of the windows. Doubling keeps the cost of all rounds below
    that of two runs.
    """
    counts = sorted({-(-most // 2**halvings) for halvings in range(MOST_ROUNDS)})
    before = [0, *counts]
    return [
        Look(windows=count, spend=(count**2 - less**2) / most**2) for less, count in zip(before, counts, strict=False)
    ]


def rounds_of(windows: Windows, *, adaptive: bool = True) -> list[Windows]:
    """Return the windows of each round on the way to all of them; one round if not adaptive."""
    if not adaptive:
        return [windows]
    return [windows.first(look.windows) for look in schedule(windows.count)]
