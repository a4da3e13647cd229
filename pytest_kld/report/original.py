"""The tables of the original scripts, character by character, so that old and new results can stand side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_kld.plain import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_kld.gate.result import GateResult

_WIDTH, _TITLE_WIDTH = 96, 92
"""Characters of the rules under the heading and under the title."""
_HEADING = f"{'Model':<40} {'Mean KLD':>10} {'Median KLD':>12} {'P95 KLD':>10} {'P99 KLD':>10} {'Max KLD':>10}"


def table(results: Sequence[GateResult], title: str | None = None) -> list[str]:
    """Return the results table.

    Args:
        results: what was measured against one reference. What was not measured has a row that says so.
        title: the line above; by default the reference, the dataset and the number of positions. If it is empty,
            there is none, as above the table of MoE backends.

    """
    title = _title(results) if title is None else title
    head = [plain(title), "=" * max(_TITLE_WIDTH, len(title)), ""] if title else []
    return [*head, _HEADING, "-" * _WIDTH, *(_row(result) for result in results), *_excluded(results)]


def _title(results: Sequence[GateResult]) -> str:
    about = next((result.about for result in results if result.about), None)
    known = next((result.figures for result in results if result.figures), None)
    measured = "" if about is None or known is None else f", dataset: {about['protocol']['dataset']}"
    measured += "" if known is None else f", {known['positions']:,} positions"
    return f"KLD Evaluation Results (ref: {results[0].reference.label}{measured})"


def _row(result: GateResult) -> str:
    name = plain(result.candidate.label)
    if result.figures is None:
        return f"{name:<40} not measured"
    mean, median, p95, p99, largest = (result.figures[figure] for figure in ("mean", "median", "p95", "p99", "max"))
    return f"{name:<40} {mean:>10.6f} {median:>12.6f} {p95:>10.6f} {p99:>10.6f} {largest:>10.4f}"


def _excluded(results: Sequence[GateResult]) -> list[str]:
    """Say how many positions the figures leave out because a side is NaN there."""
    lines = []
    for result in results:
        if result.figures is None:
            continue
        counts = {side: result.figures[f"{side}_nan_count"] for side in ("candidate", "reference")}
        lines += [
            f"NaN excluded: {count:,} of {result.figures['positions']:,} positions of {plain(result.candidate.label)} "
            f"({side})"
            for side, count in counts.items()
            if count
        ]
    return ["", *lines] if lines else []
