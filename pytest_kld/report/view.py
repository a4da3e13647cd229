"""The content of the HTML report, arranged from the results: names, order, groups. Contains no HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.gate.limits import LIMITS
from pytest_kld.gate.result import GateResult, by_candidate, worst
from pytest_kld.report.floor import floor_rows
from pytest_kld.report.matrix import MatrixSection, heat_of
from pytest_kld.report.speed import speed_section

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_kld.gate.matrix import MatrixResult
    from pytest_kld.report.speed import SpeedSection

QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}
"""The figures that are quantiles of KL."""
COLOURS = 8
UNFOLDED = 10
"""The greatest number of candidates whose worst positions are shown without a click."""
_DASHES = 4
_VERDICTS = {
    "error": ("ERROR", "!", "not measured"),
    "failed": ("FAIL", "✗", "failed"),
    "skipped": ("skip", "?", "skipped"),
    "expected": ("xfail", "✗", "failed as expected"),
    "passed": ("pass", "✓", "passed"),
}
"""Word, sign and text for the headline, from the worst to the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One candidate and all of its tests.

    Attributes:
        index: its rank among the candidates, from 0; picks its colour and dash.
        name: the user's name for it, with its axes.
        short: the end of the name if that distinguishes the candidates, else the whole name.
        results: its tests.
        measured: the first result with figures; None if there is none.

    """

    index: int
    name: str
    short: str
    results: Sequence[GateResult]
    measured: GateResult | None

    @property
    def verdict(self) -> tuple[str, str, str]:
        """Return outcome (`expected`: an expected failure), word and sign of the decisive test."""
        result = worst(self.results)
        outcome = "expected" if result.xfail and result.outcome == "failed" else result.outcome
        word, sign, _ = _VERDICTS[outcome]
        return outcome, f"{word} (inconclusive)" if result.inconclusive else word, sign

    @property
    def colour(self) -> int:
        """Return the number of its colour."""
        return self.index % COLOURS

    @property
    def dash(self) -> int:
        """Return the number of its dash pattern. Colours and dashes give 32 distinct lines."""
        return (self.index + self.index // COLOURS) % _DASHES

    @property
    def figures(self) -> dict[str, Any]:
        """Return every figure; empty if not measured."""
        return (self.measured and self.measured.figures) or {}

    @property
    def about(self) -> dict[str, Any]:
        """Return what was compared and how; empty if not measured."""
        return (self.measured and self.measured.about) or {}

    @property
    def diagnosis(self) -> dict[str, Any]:
        """Return where it departs from the reference; empty if not measured."""
        return (self.measured and self.measured.diagnosis) or {}

    @property
    def intervals(self) -> dict[str, dict[str, Any]]:
        """Return the confidence intervals by figure."""
        return self.measured.intervals if self.measured else {}

    @property
    def below_floor(self) -> list[str]:
        """Return the figures that are below twice their floor."""
        return self.measured.below_floor if self.measured else []

    def below_floor_on(self, dataset: str) -> list[str]:
        """Return the same for one of several datasets."""
        return self.measured.below_floor_on(dataset) if self.measured else []

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each dataset if there are several; else empty."""
        datasets = self.measured.datasets if self.measured else {}
        return datasets if len(datasets) > 1 else {}

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Return its figures beside the baseline's, each change once; see `regression.Change`."""
        found: list[dict[str, Any]] = []
        for result in self.results:
            found += [change for change in result.changes if change not in found]
        return found

    @property
    def profile(self) -> dict[str, Any]:
        """Return the data for its charts; empty if there is none."""
        return (self.measured and self.measured.profile) or {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate's figure and its bound. `low` and `high` are None if there is no interval."""

    candidate: Candidate
    nodeid: str
    value: float
    bound: float
    state: str
    low: float | None
    high: float | None
    more_windows: int | None
    least_windows: int | None
    below_floor: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitGroup:
    """All rows of one limit."""

    name: str
    label: str
    unit: str
    upper: bool
    integer: bool
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Mean KL by model and axes: `cells[model][column]` is (mean, heat in [0, 1]), or None if not measured.

    Attributes:
        axes: the names of the axes.
        columns: the values of the axes.
        cells: the means by model and column.

    """

    axes: str
    columns: Sequence[str]
    cells: dict[str, dict[str, tuple[float, float] | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the report shows."""

    candidates: Sequence[Candidate]
    limits: Sequence[LimitGroup]
    matrix: Matrix | None
    speed: SpeedSection | None
    between: Sequence[MatrixSection] = ()

    @property
    def measured(self) -> list[Candidate]:
        """Return the candidates that have figures."""
        return [candidate for candidate in self.candidates if candidate.measured]

    @property
    def diagnosed(self) -> list[Candidate]:
        """Return the candidates that have a diagnosis."""
        return [candidate for candidate in self.measured if candidate.diagnosis]

    @property
    def folds(self) -> bool:
        """Whether what is said of each candidate alone is folded away: a page of many candidates would be too long."""
        return len(self.candidates) > UNFOLDED

    @property
    def changed(self) -> list[Candidate]:
        """Return the candidates that are held against a baseline."""
        return [candidate for candidate in self.candidates if candidate.changes]

    @property
    def both_paths(self) -> list[Candidate]:
        """Return the candidates that were decoded beside a prefill."""
        return [candidate for candidate in self.measured if candidate.profile.get("gap")]

    @property
    def has_intervals(self) -> bool:
        """Whether a figure that has a limit has a confidence interval."""
        return any(row.low is not None for limit in self.limits for row in limit.rows)

    @property
    def quantiles(self) -> list[str]:
        """Return the figures that are quantiles of KL."""
        return list(QUANTILES)

    @property
    def about(self) -> dict[str, Any]:
        """Return the first measured candidate's description of the comparison; empty if none was measured."""
        return next((candidate.about for candidate in self.measured), {})

    @property
    def headline(self) -> str:
        """Summarise the outcome in a few words."""
        of_matrices: list[str] = [one.result.outcome for one in self.between]
        counts = [
            _counted([candidate.verdict[0] for candidate in self.candidates], "candidate", "candidates"),
            _counted(of_matrices, "matrix", "matrices"),
        ]
        return "; ".join(filter(None, counts)) or "Nothing was gated"

    @property
    def outcome(self) -> str:
        """Return the worst outcome; `none` if nothing was gated."""
        outcomes = {candidate.verdict[0] for candidate in self.candidates}
        outcomes |= {one.result.outcome for one in self.between}
        return next((outcome for outcome in _VERDICTS if outcome in outcomes), "none")

    @property
    def notes(self) -> list[str]:
        """Return what a reader should know about how the figures were obtained, each note once."""
        results = [result for candidate in self.candidates for result in candidate.results]
        return list(dict.fromkeys(note for result in results for note in result.notes))

    @property
    def floors(self) -> list[list[str]]:
        """Return the table of floors, its heading first; empty without --kld-floor."""
        return floor_rows([result for candidate in self.candidates for result in candidate.results])

    @property
    def figure_names(self) -> list[str]:
        """Return the name of every figure that a candidate has."""
        return list(dict.fromkeys(name for candidate in self.measured for name in candidate.figures))

    def histogram_rows(self) -> list[tuple[float, float, list[int]]]:
        """Return, for every bin that is not empty, its bounds and the count of each measured candidate."""
        counts: dict[tuple[float, float], dict[int, int]] = {}
        for candidate in self.measured:
            for lower, upper, count in candidate.profile.get("histogram", ()):
                counts.setdefault((lower, upper), {})[candidate.index] = count
        return [
            (lower, upper, [row.get(candidate.index, 0) for candidate in self.measured])
            for (lower, upper), row in sorted(counts.items())
        ]

    def chart_data(self) -> dict[str, Any]:
        """Return the data for the charts, as plain data."""
        quantile_of = {limit.name: limit.figure for limit in LIMITS.values() if limit.figure in QUANTILES}
        return {
            "candidates": [
                {
                    "name": candidate.name,
                    "short": candidate.short,
                    "colour": candidate.colour,
                    "dash": candidate.dash,
                    "positions": candidate.figures["positions"],
                    "mean": candidate.figures["mean"],
                    "quantiles": {name: candidate.figures[name] for name in QUANTILES},
                    "intervals": candidate.intervals,
                    **candidate.profile,
                }
                for candidate in self.measured
            ],
            "speed": list(self.speed.points) if self.speed else [],
            "quantiles": [{"name": name, "share": share} for name, share in QUANTILES.items()],
            "limits": [
                {
                    "name": limit.name,
                    "label": limit.label,
                    "unit": limit.unit,
                    "upper": limit.upper,
                    "quantile": quantile_of.get(limit.name),
                    "rows": [
                        {
                            "short": row.candidate.short,
                            "colour": row.candidate.colour,
                            **{name: getattr(row, name) for name in ("value", "bound", "low", "high", "state")},
                        }
                        for row in limit.rows
                    ],
                }
                for limit in self.limits
                if not limit.integer
            ],
        }


def view(results: Sequence[GateResult], matrices: Sequence[MatrixResult] = ()) -> Report:
    """Arrange results and matrices for the report."""
    groups = by_candidate(results)
    candidates = [
        Candidate(
            index=index,
            name=name,
            short=short,
            results=group,
            measured=next((result for result in group if result.figures), None),
        )
        for index, ((name, group), short) in enumerate(zip(groups.items(), short_names(groups), strict=True))
    ]
    return Report(
        candidates=candidates,
        limits=_limits(candidates),
        matrix=_matrix(results),
        speed=speed_section(results, {one.name: (one.short, one.colour) for one in candidates if one.measured}),
        between=[MatrixSection.of(matrix) for matrix in matrices],
    )


def short_names(names: Iterable[str]) -> list[str]:
    """Return the last part of each path or hub id, or the whole names if the last parts are not all different."""
    names = list(names)
    ends = [name.rstrip("/").rpartition("/")[2] or name for name in names]
    return ends if len(set(ends)) == len(names) else names


def _limits(candidates: Sequence[Candidate]) -> list[LimitGroup]:
    rows: dict[tuple[str, str | None], dict[tuple[int, float], Row]] = {}
    for candidate in candidates:
        for result in candidate.results:
            for check in result.checks:
                dataset = check["dataset"]
                interval = check["interval"] or {}
                row = Row(
                    candidate=candidate,
                    nodeid=result.nodeid,
                    value=check["value"],
                    bound=check["bound"],
                    state=check["state"],
                    low=interval.get("low"),
                    high=interval.get("high"),
                    more_windows=check["more_windows"],
                    least_windows=interval.get("least_windows"),
                    below_floor=check["below_floor"],
                )
                rows.setdefault((check["limit"], dataset), {})[candidate.index, row.bound] = row
    return [
        LimitGroup(
            name=name,
            label=LIMITS[name].label + (f" on {dataset}" if dataset else ""),
            unit=LIMITS[name].unit,
            upper=LIMITS[name].upper,
            integer=LIMITS[name].integer,
            rows=list(group.values()),
        )
        for (name, dataset), group in sorted(rows.items(), key=lambda item: list(LIMITS).index(item[0][0]))
    ]


def _matrix(results: Sequence[GateResult]) -> Matrix | None:
    """Arrange candidates by their axes; None if no candidate has axes."""
    means: dict[str, dict[str, float]] = {}
    for result in results:
        if result.candidate.axes:
            column = ", ".join(result.candidate.axes.values())
            row = means.setdefault(result.candidate.name, {})
            row.setdefault(column, math.nan)
            if result.figures:
                row[column] = result.figures["mean"]
    if not means:
        return None
    columns = list(dict.fromkeys(column for row in means.values() for column in row))
    axes = dict.fromkeys(axis for result in results for axis in result.candidate.axes)
    heat = heat_of([mean for row in means.values() for mean in row.values()])
    return Matrix(
        axes=", ".join(axes),
        columns=columns,
        cells={
            model: {
                column: None if math.isnan(mean := row.get(column, math.nan)) else (mean, heat[mean])
                for column in columns
            }
            for model, row in means.items()
        },
    )


def _counted(outcomes: Sequence[str], one: str, several: str) -> str:
    """Count outcomes, from the worst to the best; empty if there are none."""
    counts = [f"{outcomes.count(outcome)} {said}" for outcome, (_, _, said) in _VERDICTS.items() if outcome in outcomes]
    return f"{len(outcomes)} {one if len(outcomes) == 1 else several}: {', '.join(counts)}" if counts else ""
