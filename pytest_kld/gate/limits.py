"""Limits: every figure that can be bounded, and how its bound is determined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_kld.gate.number import decimal_number, shown
from pytest_kld.gate.speed_limits import SPEED_LIMITS, THROUGHPUT

_GREATEST_COUNT = 10**15
"""More positions than any text has; floats represent every count up to this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One kind of limit: marker argument `name`, option `--kld-name`, ini key `kld_name`.

    Attributes:
        name: e.g. `max_mean`; `max_…` bounds from above, `min_…` from below.
        figure: the attribute of `Summary` that it bounds.
        label: the figure's name in tables and messages.
        unit: the unit of the figure and the bound; empty for counts and ratios.
        greatest: the largest sensible bound.
        integer: whether the figure is a count.
        default: the bound if none is set; None means no limit.
        extended: whether the figure needs the second pass of `--kld-metrics=all`.
        floor: whether `--kld-floor` finds the figure's noise: how far from 0, or from an agreement of 1, it is between
            two runs of the same.

    """

    name: str
    figure: str
    label: str
    unit: str = ""
    greatest: float = math.inf
    integer: bool = False
    default: float | None = None
    extended: bool = False
    floor: bool = True

    @property
    def upper(self) -> bool:
        """Whether the bound is an upper one; otherwise the figure must not be less than the bound."""
        return self.name.startswith("max_")

    def parse(self, value: object) -> float:
        """Check a bound, given as a number or as text, and return it.

        Raises:
            ValueError: the value is not a number, or out of range; the message gives the value and the valid range.

        """
        kind = "a whole number" if self.integer else "a number"
        upper = "" if math.isinf(self.greatest) else f" and at most {self.greatest:g}"
        wanted = f"expected {kind} of at least 0{upper}, got {shown(value)}"
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(wanted)
        try:
            number = decimal_number(value) if isinstance(value, str) else float(value)
        except OverflowError:  # a whole number too large for a float
            raise ValueError(wanted) from None
        if number is None or not 0 <= number <= self.greatest or math.isinf(number):
            raise ValueError(wanted)
        if self.integer and (number != int(number) or number > _GREATEST_COUNT):
            raise ValueError(wanted)
        return number


LIMITS: Mapping[str, Limit] = {
    limit.name: limit
    for limit in (
        Limit(name="max_mean", figure="mean", label="mean KLD", unit="nats"),
        Limit(name="max_median", figure="median", label="median KLD", unit="nats"),
        Limit(name="max_p95", figure="p95", label="P95 KLD", unit="nats"),
        Limit(name="max_p99", figure="p99", label="P99 KLD", unit="nats"),
        Limit(name="max_p999", figure="p999", label="P99.9 KLD", unit="nats"),
        Limit(name="max_max", figure="max", label="max KLD", unit="nats"),
        Limit(
            name="max_nan",
            figure="candidate_nan_count",
            label="candidate NaN count",
            integer=True,
            default=0,
            floor=False,
        ),
        Limit(
            name="max_ref_nan",
            figure="reference_nan_count",
            label="reference NaN count",
            integer=True,
            default=0,
            floor=False,
        ),
        Limit(
            name="max_cut_mass",
            figure="cut_mass",
            label="probability outside the common vocabulary",
            greatest=1,
            default=0.01,
            floor=False,
        ),
        Limit(name="min_top1", figure="top1_agreement", label="top-1 agreement", greatest=1),
        Limit(name="max_ppl_ratio", figure="ppl_ratio", label="perplexity ratio", floor=False),
        Limit(name="max_log_ppl_ratio", figure="log_ppl_ratio", label="ln PPL ratio", unit="nats", floor=False),
        Limit(name="max_rms_delta_p", figure="rms_delta_p", label="RMS delta p", greatest=1),
        Limit(name="max_flips", figure="flips", label="share of flips", greatest=1),
        Limit(name="max_reverse_kl", figure="reverse_kl", label="mean reverse KLD", unit="nats", extended=True),
        Limit(
            name="max_js",
            figure="js",
            label="mean Jensen-Shannon divergence",
            unit="nats",
            greatest=math.log(2),
            extended=True,
        ),
        Limit(name="max_tv", figure="tv", label="mean total variation", greatest=1, extended=True),
        Limit(name="min_top5", figure="top5_overlap", label="top-5 overlap", greatest=1, extended=True),
        Limit(
            name="max_entropy_difference",
            figure="abs_entropy_difference",
            label="mean absolute entropy difference",
            unit="nats",
            extended=True,
        ),
        Limit(name="max_decode_gap", figure="decode_gap", label="mean KLD of prefill and decode", unit="nats"),
        Limit(name="min_experts_seen", figure="experts_seen", label="share of experts met", greatest=1, floor=False),
    )
}
"""Every limit, by name."""

MATRIX_LIMITS: Mapping[str, Limit] = {
    limit.name: limit
    for limit in (
        Limit(name="max_between", figure="between", label="mean KLD between two candidates of a matrix", unit="nats"),
    )
}
"""Limits on the pairs of a matrix (`--kld-matrix`). They are set where other limits are, and bound no gate."""

DEFAULT_BOUNDS: Mapping[str, float] = {
    name: limit.default for name, limit in LIMITS.items() if limit.default is not None
}


PATHS = ("prefill", "decode", "both")
"""Values of `--kld-path` and of the marker's argument `path`."""


def parse_marker(args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, float | None]:
    """Return the limits of one `kld` marker. None removes a limit that is set at an outer level.

    What it says about speed is left to `speed_limits.parse_speed_marker`.

    Raises:
        ValueError: an argument is positional, unknown or of a wrong type; the message names the valid ones.

    """
    limits, others = {**LIMITS, **MATRIX_LIMITS}, ("path", THROUGHPUT, *SPEED_LIMITS)
    valid = ", ".join((*limits, *others))
    if args:
        raise ValueError(f"the kld marker takes keyword arguments only ({valid}), got {args[0]!r}")
    if unknown := [name for name in kwargs if name not in limits and name not in others]:
        raise ValueError(f"the kld marker has no argument {unknown[0]!r}; valid are {valid}")
    if "path" in kwargs and kwargs["path"] not in PATHS:
        raise ValueError(f"kld marker, path: expected one of {', '.join(PATHS)}, got {shown(kwargs['path'])}")
    bounds: dict[str, float | None] = {}
    for name, value in kwargs.items():
        if name in others:
            continue
        try:
            bounds[name] = None if value is None else limits[name].parse(value)
        except ValueError as error:
            raise ValueError(f"kld marker, {name}: {error}") from None
    return bounds


def merge_bounds(*layers: Mapping[str, float | None], limits: Mapping[str, Limit] = LIMITS) -> dict[str, float]:
    """Combine layers of bounds, the strongest first; each limit comes from the first layer that contains it.

    Bounds of other limits than the given ones are left out.
    """
    merged: dict[str, float | None] = {}
    for layer in layers:
        merged = {**layer, **merged}
    return {name: merged[name] for name in limits if merged.get(name) is not None}  # type: ignore[misc]


def needs_extended(bounds: Mapping[str, float]) -> bool:
    """Tell whether any bounded figure needs the second pass."""
    return any(LIMITS[name].extended for name in bounds)


def why_missing(figure: str) -> str:
    """Explain why a figure is None."""
    if figure == "flips":
        return "the reference is confident at no position, so there are no flips to count"
    if figure == "decode_gap":
        return "only the test that decodes with --kld-path=both (or a marker's path) measures how far decoding departs"
    if figure == "experts_seen":
        return "the candidate is dense, or it is unknown which experts it used (the report's notes say why)"
    return f"the figure {figure} was not computed; give --kld-metrics=all"
