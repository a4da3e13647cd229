"""Limits on served speed. Each holds at one concurrency, or at every one that is measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_kld.gate.number import decimal_number, shown, whole_number

MOST_CONCURRENT = 100_000
THROUGHPUT = "throughput"
"""The marker's argument for the concurrencies that are measured."""
Bounds = Mapping[int | None, float]
"""A bound by concurrency; None stands for every concurrency that is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedLimit:
    """One kind of limit: marker argument `name`, option `--kld-name`, ini key `kld_name`.

    Attributes:
        name: `max_…` bounds from above, `min_…` from below.
        figure: the figure that it bounds, see `throughput.figures.FIGURES`.
        label: the figure's name in tables and messages.
        unit: the unit of the figure and the bound; empty for a ratio.
        relative: whether the bound is on the ratio to another Subject's figure.

    """

    name: str
    figure: str
    label: str
    unit: str = ""
    relative: bool = False

    @property
    def upper(self) -> bool:
        """Whether the bound is an upper one."""
        return self.name.startswith("max_")

    def parse(self, value: object) -> Bounds:
        """Check bounds: a number, `CONCURRENCY:BOUND,…` as text, or a mapping; and return them by concurrency.

        Raises:
            ValueError: says what is valid.

        """
        if isinstance(value, Mapping):
            return {_concurrency(key): self._bound(one) for key, one in value.items()}
        if isinstance(value, str) and ":" in value:
            pairs = [part.partition(":") for part in value.split(",")]
            bounds: dict[int | None, float] = {
                _concurrency(key.strip()): self._bound(one.strip()) for key, _, one in pairs
            }
            if len(bounds) < len(pairs):
                raise ValueError(f"a concurrency is given twice in {shown(value)}")
            return bounds
        return {None: self._bound(value)}

    def _bound(self, value: object) -> float:
        number = decimal_number(value) if isinstance(value, str) else value
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not 0 < number <= sys.float_info.max  # a whole number may be too large for a float
        ):
            raise ValueError(f"expected a number above 0, or CONCURRENCY:BOUND, got {shown(value)}")
        return float(number)


SPEED_LIMITS: Mapping[str, SpeedLimit] = {
    limit.name: limit
    for limit in (
        SpeedLimit(name="min_output_tps", figure="output_tps", label="output tokens/s", unit="tokens/s"),
        SpeedLimit(name="max_ttft", figure="ttft", label="median time to first token", unit="ms"),
        SpeedLimit(name="max_tpot", figure="tpot", label="median time per output token", unit="ms"),
        SpeedLimit(name="min_speedup", figure="output_tps", label="speedup in output tokens/s", relative=True),
    )
}
"""Every limit on speed, by name."""


def concurrencies(value: object) -> tuple[int, ...]:
    """Return the concurrencies to measure: one or several whole numbers, or their text, separated by commas.

    Raises:
        ValueError: says what is valid.

    """
    given: Sequence[object] = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else (value,)
    )
    found = tuple(_concurrency(one.strip() if isinstance(one, str) else one) for one in given)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"expected different concurrencies such as 1,4,16, got {shown(value)}")
    return found


def _concurrency(value: object) -> int:
    number = whole_number(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST_CONCURRENT:
        raise ValueError(f"expected a concurrency, a whole number from 1 to {MOST_CONCURRENT:,}, got {shown(value)}")
    return number


def at_each(bounds: Mapping[str, Bounds], measured: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return the bound of each limit at each concurrency. A bound at one concurrency wins over one for all.

    Raises:
        ValueError: a limit names a concurrency that is not measured.

    """
    found: dict[str, dict[int, float]] = {}
    for name, given in bounds.items():
        for concurrency in given:
            if concurrency is not None and concurrency not in measured:
                said = ",".join(map(str, measured)) or "none"
                raise ValueError(f"{name} has a bound at concurrency {concurrency}, but --kld-throughput is {said}")
        everywhere = {} if None not in given else dict.fromkeys(measured, given[None])
        single = {concurrency: bound for concurrency, bound in given.items() if concurrency is not None}
        found[name] = {**everywhere, **single}
    return found


def parse_speed_marker(kwargs: Mapping[str, object]) -> tuple[tuple[int, ...] | None, dict[str, Bounds | None]]:
    """Return what one `kld` marker says about speed: `throughput`, None if it says nothing, and limits.

    None as a limit removes one that is set at an outer level.

    Raises:
        ValueError: an argument is of a wrong type; the message says what is valid.

    """
    wanted: tuple[int, ...] | None = None
    bounds: dict[str, Bounds | None] = {}
    for name, value in kwargs.items():
        try:
            if name == THROUGHPUT:
                wanted = () if value is None else concurrencies(value)
            elif name in SPEED_LIMITS:
                bounds[name] = None if value is None else SPEED_LIMITS[name].parse(value)
        except ValueError as error:
            raise ValueError(f"kld marker, {name}: {error}") from None
    return wanted, bounds
