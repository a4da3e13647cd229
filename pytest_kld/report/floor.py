"""What two runs of each Subject differ by, as every report shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_kld.gate.floor import MARK, NOT_TOLD

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_kld.gate.result import GateResult

TITLE = "Run-to-run floor"
SHOWN = (
    ("Mean KLD", "mean", ".3g"),
    ("Median KLD", "median", ".3g"),
    ("P99 KLD", "p99", ".3g"),
    ("Max KLD", "max", ".3g"),
    ("Top-1", "top1_agreement", ".2%"),
)
"""Heading, figure and format of the columns of the table."""
EXPLANATION = (
    f"KL(run 1 ‖ run 2) of each model on two fresh servers. {MARK} marks what is below twice the larger floor of both "
    f"sides: it is {NOT_TOLD}."
)


def floors_of(results: Iterable[GateResult]) -> list[tuple[str, dict[str, Any]]]:
    """Return each Subject's name and the figures of its two runs, each once; empty without --kld-floor."""
    found: list[tuple[str, dict[str, Any]]] = []
    for result in results:
        for subject, side in ((result.reference, "reference"), (result.candidate, "candidate")):
            if result.floor is not None and (one := (subject.label, result.floor[side])) not in found:
                found.append(one)
    return found


def floor_rows(results: Sequence[GateResult]) -> list[list[str]]:
    """Return the table's heading and rows; empty without --kld-floor."""
    rows = [
        [name, *(format(figures[figure], form) for _, figure, form in SHOWN)] for name, figures in floors_of(results)
    ]
    return [[TITLE, *(heading for heading, _, _ in SHOWN)], *rows] if rows else []


def marked(text: str, figure: str, below: Iterable[str]) -> str:
    """Return a figure's text, marked if the figure is among those below twice their floor."""
    return f"{MARK}{text}" if figure in below else text
