"""The floor of a comparison: how far two runs of one side differ. What is below twice the floor may be noise.

A side that is run twice gives the same logits if engine, kernels and schedule are deterministic, and others if they are
not. KL(run 1 ‖ run 2) is the divergence that its runs have by themselves. The floor of a comparison is the larger one
of its two sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_kld.gate.limits import LIMITS, Limit

TIMES = 2
"""A difference below this many times the floor is not told from noise."""
NOT_TOLD = "not distinguishable from run-to-run noise"
"""What is said of such a difference."""
MARK = "~"
"""The mark of such a difference in tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The figures of two runs of each side.

    Attributes:
        reference: every figure of `Summary` of KL(run 1 ‖ run 2) of the reference; `decode_gap` is the larger mean of
            the two paths, or None if only one path was measured.
        candidate: the same of the candidate.
        datasets: the floor of each of several datasets, by its name; else empty.

    """

    reference: Mapping[str, Any]
    candidate: Mapping[str, Any]
    datasets: Mapping[str, Floor] = field(default_factory=dict)

    def of(self, limit: Limit) -> float | None:
        """Return the floor of a figure: how far from its value for two equal runs it is, on the worse side.

        For a share that agrees it is the share that does not, so it is 0 for equal runs whatever the figure.

        Args:
            limit: the limit of the figure.

        Returns:
            The floor in the figure's unit; None if the figure has none, such as a count, or was not computed.

        """
        if not limit.floor:
            return None
        known = [side[limit.figure] for side in (self.reference, self.candidate) if side[limit.figure] is not None]
        return max((distance(limit, value) for value in known), default=None)

    def below(self, figures: Mapping[str, Any]) -> list[str]:
        """Return which figures, named as in `Summary`, are below twice their floor."""
        return [
            limit.figure
            for limit in LIMITS.values()
            if figures.get(limit.figure) is not None
            and is_below(distance(limit, figures[limit.figure]), self.of(limit))
        ]

    def to_json(self, figures: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return plain data.

        Args:
            figures: the figures of the comparison.
            datasets: the same for each dataset.

        """
        return {
            "reference": dict(self.reference),
            "candidate": dict(self.candidate),
            "below": self.below(figures),
            "datasets": {name: floor.to_json(datasets[name], {}) for name, floor in self.datasets.items()},
        }


def floor_of_pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float]:
    """Return the floor between two candidates: the larger one of both.

    Args:
        first: the figures of two runs of one, see `Floor`.
        second: those of the other.

    Returns:
        `mean`, `p99` and `max` in nats, and `disagreement`, the share of top tokens that change.

    """
    floor = Floor(reference=first, candidate=second)
    named = {"mean": "max_mean", "p99": "max_p99", "max": "max_max", "disagreement": "min_top1"}
    return {name: floor.of(LIMITS[limit]) or 0.0 for name, limit in named.items()}


def distance(limit: Limit, value: float) -> float:
    """Return how far a figure, or a bound of it, is from the figure of two equal sides."""
    return value if limit.upper else 1 - value


def is_below(difference: float, floor: float | None) -> bool:
    """Tell whether a difference is below twice the floor; no difference is below a floor of 0."""
    return floor is not None and (abs(difference) < TIMES * floor or math.isinf(floor))
