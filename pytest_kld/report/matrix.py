"""Matrices as tables: candidates by candidates, and pair by pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.gate.floor import MARK, NOT_TOLD, is_below
from pytest_kld.plain import plain
from pytest_kld.report.terminal import aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_kld.gate.matrix import MatrixResult

PAIRS = ("Pair", "KL", "KL back", "P99", "Max", "Top-1 differs", "KLD difference", "Its interval", "Verdict")
"""Headings of the table of pairs. P99 and Max are the larger ones of both directions."""
_WORDS = {"pass": "ok", "fail": "FAIL", "inconclusive": "undecided"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSection:
    """What the HTML and the Markdown report show of one matrix.

    Attributes:
        result: the matrix.
        names: the members that were compared, as the matrix names them.
        cells: for each of them (mean KL(row ‖ column) in nats, heat in [0, 1], whether it is below twice its floor) for
            each; None on the diagonal.
        rows: a row for each pair, its names first, under the headings `PAIRS`.

    """

    result: MatrixResult
    names: list[str]
    cells: list[list[tuple[float, float, bool] | None]]
    rows: list[list[str]]

    @classmethod
    def of(cls, matrix: MatrixResult) -> MatrixSection:
        """Arrange one matrix."""
        labels = measured(matrix)
        means = [[matrix.mean(label, other) for other in labels] for label in labels]
        heat = heat_of([mean for row in means for mean in row if mean is not None])
        cells = [
            [
                None if mean is None else (mean, heat.get(mean, 0.0), matrix.is_below_floor(label, other))
                for other, mean in zip(labels, row, strict=True)
            ]
            for label, row in zip(labels, means, strict=True)
        ]
        return cls(
            result=matrix,
            names=[matrix.short(label) for label in labels],
            cells=cells,
            rows=[[_names(matrix, pair), *cells_of(pair)] for pair in matrix.pairs],
        )

    @property
    def title(self) -> str:
        """Return what is compared."""
        return title_of(self.result)

    @property
    def headings(self) -> tuple[str, ...]:
        """Return the headings of `rows`."""
        return PAIRS

    @property
    def notes(self) -> list[str]:
        """Return what a reader should know."""
        return notes_of(self.result)


def _names(matrix: MatrixResult, pair: dict[str, Any]) -> str:
    return f"{matrix.short(pair['first'])} | {matrix.short(pair['second'])}"


def title_of(matrix: MatrixResult) -> str:
    """Return what is compared, on one line."""
    title = f"Candidates against each other: {matrix.title}"
    if matrix.about is not None:
        title += f", dataset: {matrix.about['protocol']['dataset']}, {matrix.pairs[0]['positions']:,} positions"
    return title


def grid(matrix: MatrixResult) -> list[list[str]]:
    """Return the mean KL(row ‖ column) in nats of each pair, with a heading; members without a capture are left out."""
    labels = measured(matrix)
    rows = [["Mean KL(row ‖ column)", *(f"[{number}]" for number in range(1, len(labels) + 1))]]
    for number, label in enumerate(labels, 1):
        rows.append([f"[{number}] {matrix.short(label)}", *(_cell(matrix, label, other) for other in labels)])
    return rows


def _cell(matrix: MatrixResult, row: str, column: str) -> str:
    mean = matrix.mean(row, column)
    return "-" if mean is None else f"{MARK if matrix.is_below_floor(row, column) else ''}{mean:.4g}"


def measured(matrix: MatrixResult) -> list[str]:
    """Return the labels of the members that were compared."""
    compared = {pair[side] for pair in matrix.pairs for side in ("first", "second")}
    return [member.label for member in matrix.members if member.label in compared]


def pair_rows(matrix: MatrixResult) -> list[list[str]]:
    """Return a row for each pair, under the headings `PAIRS`; a pair is named by its places in the grid."""
    numbers = {label: number for number, label in enumerate(measured(matrix), 1)}
    return [[f"[{numbers[pair['first']]}] [{numbers[pair['second']]}]", *cells_of(pair)] for pair in matrix.pairs]


def cells_of(pair: dict[str, Any]) -> list[str]:
    """Return the cells of a pair, without its name."""
    interval, floor = pair["difference_interval"], pair["floor"] or {}

    def marked(value: float, name: str, text: str) -> str:
        return f"{MARK}{text}" if is_below(value, floor.get(name)) else text

    greatest = {name: max(pair[direction][name] for direction in ("forth", "back")) for name in ("p99", "max")}
    return [
        *(marked(pair[direction]["mean"], "mean", _mean(pair[direction])) for direction in ("forth", "back")),
        *(marked(value, name, f"{value:.4g}") for name, value in greatest.items()),
        marked(pair["disagreement"], "disagreement", f"{pair['disagreement']:.2%}"),
        marked(pair["difference"], "mean", f"{pair['difference']:+.4g}"),
        "-" if interval["least_windows"] else f"[{interval['low']:+.4g}, {interval['high']:+.4g}]",
        verdict_of(pair),
    ]


def verdict_of(pair: dict[str, Any]) -> str:
    """Return the word for the worst check of a pair; `-` if nothing bounds it."""
    from pytest_kld.gate.matrix import worst_state

    return _WORDS[worst_state([check["state"] for check in pair["checks"]])] if pair["checks"] else "-"


def _mean(direction: dict[str, Any]) -> str:
    interval = direction["interval"]
    known = "" if interval is None else f" [{interval['low']:.4g}, {interval['high']:.4g}]"
    return f"{direction['mean']:.4g}{known}"


def notes_of(matrix: MatrixResult) -> list[str]:
    """Return the lines under the tables of a matrix: what is missing, and how to read the difference."""
    found = [f"{label} is not in the matrix: {why}" for label, why in matrix.gaps.items()]
    if omitted := max((pair["not_finite"] for pair in matrix.pairs), default=0):
        found.append(f"up to {omitted:,} positions of a pair are left out, because one side is not finite there")
    if any(pair["floor"] for pair in matrix.pairs):
        found.append(f"{MARK} marks what is below twice the larger floor of both candidates: {NOT_TOLD}")
    return found


def matrix_lines(matrices: Sequence[MatrixResult]) -> list[str]:
    """Return the lines of every matrix for the terminal."""
    lines: list[str] = []
    for matrix in matrices:
        lines += ["", plain(title_of(matrix))]
        if matrix.pairs:
            lines += aligned(grid(matrix), left=(0,))
            lines += ["", *aligned([list(PAIRS), *pair_rows(matrix)], left=(0, len(PAIRS) - 1))]
        else:
            lines.append(f"ERROR: {plain(matrix.message.partition(chr(10))[0])}")
        lines += [plain(f"note: {note}") for note in notes_of(matrix)]
    return lines


def heat_of(means: Sequence[float]) -> dict[float, float]:
    """Place each mean between the smallest and the greatest on a log scale; 0 and infinity are at the ends."""
    logs = [math.log(mean) for mean in means if 0 < mean < math.inf]
    low, width = min(logs, default=0.0), (max(logs, default=0.0) - min(logs, default=0.0)) or 1.0
    return {
        mean: 0.0 if mean <= 0 else 1.0 if math.isinf(mean) else (math.log(mean) - low) / width
        for mean in means
        if not math.isnan(mean)
    }
