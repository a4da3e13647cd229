"""The Markdown summary: for pull requests, job summaries and model cards.

It is GitHub Flavored Markdown. Text from outside is put in code spans or fences, where nothing is markup.
"""

from __future__ import annotations

import html
import math
import re
from typing import TYPE_CHECKING, Any

from pytest_kld import __version__
from pytest_kld.files import append_report, write_report
from pytest_kld.gate.floor import MARK
from pytest_kld.gate.result import by_suite
from pytest_kld.plain import LINES, in_code_span, plain, show_token
from pytest_kld.report.floor import EXPLANATION, marked
from pytest_kld.report.floor import TITLE as FLOOR
from pytest_kld.report.matrix import MatrixSection
from pytest_kld.report.merge import by_comparison
from pytest_kld.report.protocol import protocol_of
from pytest_kld.report.saw import TITLE, saw_lines
from pytest_kld.report.view import view

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_kld.gate.matrix import MatrixResult
    from pytest_kld.gate.result import GateResult, Incomplete, Shard
    from pytest_kld.report.speed import SpeedSection
    from pytest_kld.report.view import Report

_WORST = 8
"""Worst positions that are shown of a candidate."""
_MOST_FOLDED = 20
"""Candidates whose worst positions are shown: GitHub drops a job summary of more than 1 MiB."""
_CONTEXT = 60
"""The number of context characters shown before a label."""
_COLUMNS = (
    ("Mean KLD", "mean", ".6f"),
    ("Median", "median", ".6f"),
    ("P95", "p95", ".6f"),
    ("P99", "p99", ".6f"),
    ("Max", "max", ".4f"),
    ("Top-1", "top1_agreement", ".2%"),
)
_CARD = (
    ("Mean KLD", "mean", ".6f"),
    ("Median KLD", "median", ".6f"),
    ("P99 KLD", "p99", ".6f"),
    ("Top-1 agreement", "top1_agreement", ".2%"),
    ("PPL ratio", "ppl_ratio", ".6f"),
)
"""Heading, figure and format of the columns of both tables."""


def write_markdown_report(
    path: Path,
    results: Sequence[GateResult],
    incomplete: Incomplete | None = None,
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> None:
    """Write the summary as a file, completely or not at all.

    Raises:
        ReportError: the file cannot be written.

    """
    write_report(path, render(results, incomplete, shard, matrices).encode())


def append_markdown_report(
    path: Path,
    results: Sequence[GateResult],
    incomplete: Incomplete | None = None,
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> None:
    """Append the summary to a file that others write to as well.

    Raises:
        ReportError: the file cannot be written.

    """
    append_report(path, f"\n{render(results, incomplete, shard, matrices)}".encode())


def render(
    results: Sequence[GateResult],
    incomplete: Incomplete | None = None,
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> str:
    """Return the summary, with a section for each suite, reference and protocol, and for each matrix."""
    groups = [group for suite in by_suite(results) for group in by_comparison(suite)]
    if not matrices:
        groups = groups or [[]]
    lines = [line for group in groups for line in _section(view(group))]
    lines += [line for matrix in matrices for line in _matrix(MatrixSection.of(matrix))]
    if incomplete is not None:
        missing = [str(incomplete), *incomplete.not_measured]
        lines = ["**Incomplete**", "", *_fenced("\n".join(plain(line) for line in missing)), "", *lines]
    what = "" if shard is None else f", {shard}"
    return "\n".join([*lines, "", f"Written by pytest-kld {__version__}{what}.", ""])


def _section(report: Report) -> Iterator[str]:
    suite = next((result.suite for one in report.candidates for result in one.results), None)
    yield f"### KLD{f' of {in_code_span(suite)}' if suite else ''}: {report.headline}"
    yield ""
    if not report.candidates:
        return
    yield f"KL(reference ‖ candidate) in nats{_protocol(report)}."
    yield ""
    yield from _table(["Model", "Verdict", *(heading for heading, _, _ in _COLUMNS), "NaN"], _rows(report))
    if report.limits:
        yield ""
        yield from _table(["Limit", "Model", "Figure", "Bound", "State"], _limit_rows(report))
    if report.changed:
        yield ""
        heading = ["Model", "Figure", "Now", "Baseline", "Change", "Interval of the change", "Allowed", "State"]
        yield from _table(heading, _change_rows(report))
    if report.floors:
        heading, *rows = report.floors
        table = list(_table(heading, [[in_code_span(name), *figures] for name, *figures in rows]))
        yield from _folded(FLOOR, [EXPLANATION, "", *table])
    if report.speed:
        yield from _folded("Speed", list(_speed(report.speed)))
    if messages := [result.message for one in report.candidates for result in one.results if result.message]:
        yield from _folded("Messages", _fenced("\n\n".join(dict.fromkeys(messages))))
    if saw := saw_lines([result for candidate in report.candidates for result in candidate.results]):
        yield from _folded(TITLE, _fenced("\n".join(saw)))
    if report.notes:
        yield from _folded("Notes", _fenced("\n".join(report.notes)))
    yield from _worst_tokens(report)
    if report.measured:
        yield from _folded("Table for a model card", _fenced("\n".join(_card(report)), "markdown"))


def _matrix(matrix: MatrixSection) -> Iterator[str]:
    result = matrix.result
    suite = f" of {in_code_span(result.suite)}" if result.suite else ""
    yield ""
    yield f"### KLD{suite}, against each other: {in_code_span(result.label)}, {result.outcome}"
    yield ""
    if matrix.rows:
        yield "Mean KL(row ‖ column) in nats, then each pair."
        yield ""
        cells = [
            ["–" if cell is None else f"{MARK if cell[2] else ''}{_number(cell[0], '.4g')}" for cell in row]
            for row in matrix.cells
        ]
        names = [in_code_span(name) for name in matrix.names]
        yield from _table(["", *names], [[name, *row] for name, row in zip(names, cells, strict=True)])
        yield ""
        rows = [[in_code_span(pair.replace("|", "‖")), *figures] for pair, *figures in matrix.rows]
        yield from _table(matrix.headings, rows)
    for note in matrix.notes:
        yield ""
        yield f"Note: {in_code_span(note)}."
    if result.message:
        yield from _folded("Message", _fenced(result.message))


def _protocol(report: Report) -> str:
    reference = in_code_span(report.candidates[0].results[0].reference.label)
    return f", reference {reference}" + (f": {protocol_of(report.about, in_code_span)}" if report.measured else "")


def _rows(report: Report) -> Iterator[list[str]]:
    for one in report.candidates:
        _, word, sign = one.verdict
        cells = [
            marked(_figure(one.figures, name, form, one.intervals), name, one.below_floor) for _, name, form in _COLUMNS
        ]
        yield [in_code_span(one.name), f"{sign} {word}", *cells, _nan(one.figures)]
        for dataset, figures in one.datasets.items():
            below = one.below_floor_on(dataset)
            cells = [marked(_figure(figures, name, form, {}), name, below) for _, name, form in _COLUMNS]
            yield [f"– on {in_code_span(dataset)}", "", *cells, _nan(figures)]


def _limit_rows(report: Report) -> Iterator[list[str]]:
    for limit in report.limits:
        label, _, dataset = limit.label.partition(" on ")
        for row in limit.rows:
            interval = {limit.name: {"low": row.low, "high": row.high}} if row.low is not None else {}
            value = _figure({limit.name: row.value}, limit.name, ".0f" if limit.integer else ".6g", interval)
            bound = f"{'≤' if limit.upper else '≥'} {format(row.bound, '.6g')}"
            where = f" on {in_code_span(dataset)}" if dataset else ""
            value = f"{MARK if row.below_floor else ''}{value}"
            yield [f"{label}{where}", in_code_span(row.candidate.name), value, bound, row.state]


def _change_rows(report: Report) -> Iterator[list[str]]:
    for one in report.changed:
        for change in one.changes:
            share = "" if change["share"] is None else f" ({change['share']:+.1%})"
            ends = [change["interval"][end] for end in ("low", "high")] if change["interval"] else []
            yield [
                in_code_span(one.name),
                change["label"],
                _number(change["value"], ".6g"),
                _number(change["before"], ".6g"),
                f"{MARK if change['below_floor'] else ''}{_number(change['difference'], '+.6g')}{share}",
                f"[{', '.join(_number(end, '+.6g') for end in ends)}]" if ends else "–",
                change["allowed"] or "–",
                change["state"] if change["allowed"] else "–",
            ]


def _speed(speed: SpeedSection) -> Iterator[str]:
    for caption, (heading, *rows) in speed.tables.items():
        yield from ("", caption, "")
        yield from _table(heading, [[in_code_span(name), *figures] for name, *figures in rows])


def _figure(figures: dict[str, Any], name: str, form: str, intervals: dict[str, dict[str, Any]]) -> str:
    value = figures.get(name)
    if value is None:
        return "–"
    interval = intervals.get(name)
    ends = "" if interval is None else f" [{_number(interval['low'], form)}, {_number(interval['high'], form)}]"
    return f"{_number(value, form)}{ends}"


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "–"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else format(value, form)


def _nan(figures: dict[str, Any]) -> str:
    if not figures:
        return "–"
    reference = figures["reference_nan_count"]
    return f"{figures['candidate_nan_count']:,}" + (f" (reference {reference:,})" if reference else "")


def _worst_tokens(report: Report) -> Iterator[str]:
    """Fold away the worst positions of each candidate, failed ones first."""
    having = sorted(report.diagnosed, key=lambda one: one.verdict[0] == "passed")
    for one in having[:_MOST_FOLDED]:
        rows = [_worst_row(position) for position in one.diagnosis["worst_positions"][:_WORST]]
        if rows:
            heading = ["KL", "Context", "Next token", "Reference", "Candidate"]
            yield from _folded("Worst tokens of", list(_table(heading, rows)), one.name)
    if len(having) > _MOST_FOLDED:
        yield ""
        yield f"Worst tokens of {len(having) - _MOST_FOLDED} more candidates are in the HTML and JSON reports."


def _worst_row(position: dict[str, Any]) -> list[str]:
    context = position["context"]
    label = "–" if position["label"] is None else _token(position["label"], position["label_text"])
    tops = [_top(position[side]) for side in ("reference_top", "candidate_top")]
    return [
        _number(position["kl"], ".4g"),
        "–" if context is None else in_code_span(show_token(context[-_CONTEXT:])),
        label,
        *tops,
    ]


def _top(tokens: list[dict[str, Any]]) -> str:
    return f"{_token(tokens[0]['id'], tokens[0]['text'])} {tokens[0]['p']:.1%}" if tokens else "–"


def _token(token_id: int, text: str | None) -> str:
    return f"{token_id}" if text is None else in_code_span(show_token(text))


def _card(report: Report) -> Iterator[str]:
    """Return a table of the measured candidates, and their protocol in one line."""
    rows = [
        [in_code_span(one.name), *(_figure(one.figures, name, form, one.intervals) for _, name, form in _CARD)]
        for one in report.measured
    ]
    yield from _table(["Model", *(heading for heading, _, _ in _CARD)], rows)
    yield ""
    versions = f"pytest-kld {report.about['versions'].get('pytest-kld', __version__)}"
    confidence = next((one["confidence"] for each in report.measured for one in each.intervals.values()), None)
    sure = "" if confidence is None else f"; intervals at confidence {confidence:g}"
    yield f"KL(reference ‖ candidate) in nats{_protocol(report)}{sure}; {versions}."


def _table(heading: Sequence[str], rows: Any) -> Iterator[str]:
    for row in (heading, ["---"] * len(heading), *rows):
        yield f"| {' | '.join(row)} |"


def _folded(summary: str, lines: Sequence[str], name: str | None = None) -> Iterator[str]:
    """Yield a block that is closed at first. An empty line ends the HTML, so that Markdown follows."""
    code = "" if name is None else f" <code>{html.escape(plain(name))}</code>"
    yield from ("", f"<details><summary>{summary}{code}</summary>", "", *lines, "", "</details>")


def _fenced(text: str, language: str = "text") -> list[str]:
    """Return a block in which nothing is markup: its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *plain(text, keep=LINES).splitlines(), fence]
