"""The schedule of adaptive windows: when to look at the data, and what error each look may spend.

Who looks several times and stops when the answer pleases is wrong more often than each look says. So the looks share
the error: one that brings the windows from a share of the greatest number to a larger one may spend the difference of
the squares (α-spending, Lan & DeMets 1983, with a power function of Kim & DeMets 1987). These add up to 1, so that
by Bonferroni's inequality all looks together err no more often than 1 − confidence, however they depend on each
other. The square is for the heavy tail: a look at few windows, which may not have seen any of it, gets little to spend.
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
        windows: windows that are there then.
        spend: the share of the error, 1 − confidence, that this look may use up.

    """

    windows: int
    spend: float


def schedule(most: int) -> list[Look]:
    """Return the looks on the way to `most` windows: each round doubles what is there.

    Five rounds at most, the first a sixteenth; doubling keeps the cost of all rounds within that of two runs.
    """
    counts = sorted({-(-most // 2**halvings) for halvings in range(MOST_ROUNDS)})
    before = [0, *counts]
    return [
        Look(windows=count, spend=(count**2 - less**2) / most**2) for less, count in zip(before, counts, strict=False)
    ]


def rounds_of(windows: Windows) -> list[Windows]:
    """Return the windows of each round on the way to all of them."""
    return [windows.first(look.windows) for look in schedule(windows.count)]
