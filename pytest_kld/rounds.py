"""Adaptive windows: look at the data after each round and stop as soon as every limit is decided.

Who looks several times and stops when the answer pleases is wrong more often than each look says. So the looks share
the error: one that brings the windows from a share of the greatest number to a larger one may spend the difference of
the squares (α-spending, Lan & DeMets 1983, with a power function of Kim & DeMets 1987). These add up to 1, so that
by Bonferroni's inequality all looks together err no more often than 1 − confidence, however they depend on each
other. The square is for the heavy tail: a look at few windows, which may not have seen any of it, gets little to spend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_kld.gate import judge
from pytest_kld.scores import Summary
from pytest_kld.uncertainty import intervals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_kld.capture import Capture
    from pytest_kld.measurement import Measurement
    from pytest_kld.scores import Scores
    from pytest_kld.windows import Windows

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """One pair that is measured in rounds.

    Attributes:
        measurement: where captures and scores come from.
        reference: the reference's capture of the first round, or of more windows.
        candidate: the candidate's.
        windows: all that there may be.
        extended: whether the columns of the second pass are needed.

    """

    measurement: Measurement
    reference: Capture
    candidate: Capture
    windows: Windows
    extended: bool = False

    def until_decided(self, bounds: Mapping[str, float]) -> tuple[Scores, float]:
        """Return the scores of the first round that decides every limit, or of the last, and what it may spend.

        Reference and candidate advance together; what the cache holds is looked at and not made again.
        """
        config, reference, candidate, scores = self.measurement.config, self.reference, self.candidate, None
        assert config.confidence is not None
        for look in schedule(self.windows.count):
            windows = self.windows.first(look.windows)
            reference = self.measurement.extend(reference, windows, None)
            candidate = self.measurement.extend(candidate, windows, reference)
            scores = self.measurement.scores(reference, candidate, windows, extended=self.extended, known=scores)
            counted = scores.without_first(config.skip_first)
            known = intervals(counted, config.confidence, spend=look.spend)
            verdict = judge(Summary.of(counted).to_json(), bounds, intervals=known, windows=look.windows)
            self.measurement.progress.note(f"{candidate.name}, {look.windows} windows: {verdict.state}")
            if verdict.decided:
                break
        return counted, look.spend
