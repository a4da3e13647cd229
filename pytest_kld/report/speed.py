"""Served speed in the terminal: output tokens/s by concurrency, and the latencies behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_kld.gate.result import GateResult

_LATENCIES = (
    ("tok/s per request", "output_tps_per_request"),
    ("requests/s", "request_rate"),
    ("TTFT ms", "ttft"),
    ("P99 TTFT", "ttft_p99"),
    ("TPOT ms", "tpot"),
    ("P99 TPOT", "tpot_p99"),
    ("ITL ms", "itl"),
    ("E2E ms", "e2e"),
    ("P99 E2E", "e2e_p99"),
    ("Failed", "failed"),
)
"""Heading and figure of the columns of the second table."""


def measured_speeds(results: Sequence[GateResult]) -> dict[str, dict[str, Any]]:
    """Return the measured speeds by label: those that ratios are taken to first, then the candidates."""
    told = [result for result in results if result.speed]
    found: dict[str, dict[str, Any]] = {}
    for result in told:
        if result.speed and result.speed["base"]:
            found.setdefault(result.speed["base_label"], result.speed["base"])
    for result in told:
        if result.speed:
            found[result.candidate.label] = result.speed["candidate"]
    return found


def speed_title(speeds: dict[str, dict[str, Any]]) -> str:
    """Return what was measured, on one line."""
    first = next(iter(speeds.values()))
    settings, devices = first["settings"], first["devices"]
    return (
        f"Output tokens/s ({settings['input_tokens']:,} tokens in, {settings['output_tokens']:,} out, median of "
        f"{settings['rounds']} round{'' if settings['rounds'] == 1 else 's'}, on "
        f"{', '.join(dict.fromkeys(str(device['name']) for device in devices))})"
    )


def concurrencies(speeds: dict[str, dict[str, Any]]) -> list[int]:
    """Return every measured concurrency."""
    return sorted({cell["concurrency"] for speed in speeds.values() for cell in speed["cells"]})


def figure_at(speed: dict[str, Any], concurrency: int, figure: str) -> float | None:
    """Return a figure at a concurrency, or None if it was not measured there."""
    cells = (cell for cell in speed["cells"] if cell["concurrency"] == concurrency)
    return next((cell["figures"][figure] for cell in cells), None)


def throughput_rows(speeds: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the table of output tokens/s, its heading first."""
    columns = concurrencies(speeds)
    rows = [["Model", *(f"C={concurrency}" for concurrency in columns)]]
    for label, speed in speeds.items():
        values = (figure_at(speed, concurrency, "output_tps") for concurrency in columns)
        rows.append([label, *("-" if value is None else f"{value:,.1f}" for value in values)])
    return rows


def latency_rows(speeds: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the table of latencies, its heading first."""
    rows = [["Model", "C", *(heading for heading, _ in _LATENCIES)]]
    for label, speed in speeds.items():
        for cell in speed["cells"]:
            figures = cell["figures"]
            values = (
                f"{figures[name]:,.0f}" if name == "failed" else f"{figures[name]:,.2f}" for _, name in _LATENCIES
            )
            rows.append([label, str(cell["concurrency"]), *values])
    return rows


def check_lines(results: Sequence[GateResult]) -> list[str]:
    """Return one line for each limit on speed."""
    words = {"pass": "ok   ", "fail": "FAIL ", "inconclusive": "?    "}
    return [
        f"{words[check['state']]}{result.candidate.label}: {check['text']}"
        for result in results
        if result.speed
        for check in result.speed["checks"]
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSection:
    """What the HTML report shows of speed.

    Attributes:
        title: what was measured.
        tables: rows by caption, the heading first.
        checks: each check with its candidate's label.
        points: mean KLD against output tokens/s for each candidate and concurrency; `front` marks those that no other
            candidate beats in both at the same concurrency.

    """

    title: str
    tables: Mapping[str, list[list[str]]]
    checks: Sequence[tuple[str, Mapping[str, Any]]]
    points: Sequence[Mapping[str, Any]]


def speed_section(results: Sequence[GateResult], drawn: Mapping[str, tuple[str, int]]) -> SpeedSection | None:
    """Return the section of the HTML report; None if no speed was measured.

    Args:
        results: all results.
        drawn: short name and colour of each measured candidate, by label.

    """
    speeds = measured_speeds(results)
    if not speeds:
        return None
    checks = [(result.candidate.label, check) for result in results if result.speed for check in result.speed["checks"]]
    return SpeedSection(
        title=speed_title(speeds),
        tables={"Output tokens/s by concurrency": throughput_rows(speeds), "Latencies": latency_rows(speeds)},
        checks=checks,
        points=_points(results, drawn),
    )


def _points(results: Sequence[GateResult], drawn: Mapping[str, tuple[str, int]]) -> list[dict[str, Any]]:
    points: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        if result.speed is None or result.figures is None or result.candidate.label not in drawn:
            continue
        short, colour = drawn[result.candidate.label]
        for cell in result.speed["candidate"]["cells"]:
            points[result.candidate.label, cell["concurrency"]] = {
                "short": short,
                "colour": colour,
                "concurrency": cell["concurrency"],
                "tps": cell["figures"]["output_tps"],
                "kl": result.figures["mean"],
            }
    for point in points.values():
        point["front"] = not any(_beats(other, point) for other in points.values())
    return list(points.values())


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether a point is at least as fast and as close as another, and better in one of the two."""
    return (
        one["concurrency"] == other["concurrency"]
        and one["tps"] >= other["tps"]
        and one["kl"] <= other["kl"]
        and (one["tps"], one["kl"]) != (other["tps"], other["kl"])
    )
