"""Axes: what is varied for one candidate. Their cross product, less what is excluded, gives its Subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

MOST_COMBINATIONS = 10_000


def combinations(axes: Mapping[str, Sequence[str]], exclude: Sequence[Mapping[str, str]] = ()) -> list[dict[str, str]]:
    """Return the cross product of axes; the last axis varies fastest.

    Args:
        axes: the values of each axis, by its name.
        exclude: combinations to leave out; each names some axes with a value, and every combination that has all of
            these values is left out.

    Returns:
        For each combination, the value of each axis. Without axes this is one empty combination.

    Raises:
        ValueError: there are too many combinations, or none is left.

    """
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_COMBINATIONS:
        raise ValueError(f"the axes have {count:,} combinations; at most {MOST_COMBINATIONS:,} are possible")
    every = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    left = [one for one in every if not any(out.items() <= one.items() for out in exclude)]
    if not left:
        raise ValueError("every combination of the axes is excluded")
    return left
