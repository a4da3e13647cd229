"""What the terminal shows: the header line, progress, and the table at the end."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pytest_kld.gate.floor import MARK
from pytest_kld.gate.result import GateResult, by_candidate, by_suite, worst
from pytest_kld.gate.verdict import band
from pytest_kld.plain import plain
from pytest_kld.report.floor import floor_rows, marked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from pytest_kld.gate.result import Incomplete


_SECONDS_BETWEEN_LINES = 10.0
"""If the output is not a terminal, a line is printed this often; on a terminal the line is rewritten."""
_SECONDS_BETWEEN_REWRITES = 0.2


class TerminalProgress:
    """Writes progress despite pytest's capturing. Silent with -q; xdist's workers have no terminal."""

    def __init__(self, config: pytest.Config) -> None:
        """Find the terminal, if there is one."""
        quiet = config.getoption("verbose", 0) < 0  # the option is missing without pytest's terminal plugin
        self._reporter: Any = None if quiet else config.pluginmanager.getplugin("terminalreporter")
        self._capturing: Any = config.pluginmanager.getplugin("capturemanager")

    def note(self, text: str) -> None:
        """Print one line."""
        self._write(f"kld: {text}", last=True)

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[TerminalTask]:
        """Show the progress of a task, and its duration when it is done."""
        task = TerminalTask(self, name, total, done)
        yield task
        task.finish()

    def _write(self, line: str, *, last: bool) -> None:
        if self._reporter is None:
            return
        line = plain(line)
        with self._capturing.global_and_fixture_disabled() if self._capturing else nullcontext():
            self._reporter.ensure_newline()
            if self._reporter.isatty:
                width = self._reporter._tw.fullwidth - 1  # a longer line wraps and cannot be rewritten
                self._reporter.rewrite(line if last else line[:width], erase=True)
                if last:
                    self._reporter.write_line("")
            else:
                self._reporter.write_line(line)
            self._reporter.flush()

    @property
    def seconds_between_lines(self) -> float:
        """Return the shortest time between two lines of a task."""
        terminal = self._reporter is not None and self._reporter.isatty
        return _SECONDS_BETWEEN_REWRITES if terminal else _SECONDS_BETWEEN_LINES


class TerminalTask:
    """Counts windows and reports at intervals."""

    def __init__(self, progress: TerminalProgress, name: str, total: int, done: int) -> None:
        """Start the clock."""
        self._progress, self._name, self._total = progress, name, total
        self._done, self._before = done, done
        self._started = self._written = time.monotonic()

    def advance(self) -> None:
        """Count one window."""
        self._done += 1
        now = time.monotonic()
        if now - self._written >= self._progress.seconds_between_lines and self._done < self._total:
            self._written = now
            rate = (self._done - self._before) / (now - self._started)
            eta = (self._total - self._done) / rate
            self._say(f"{rate:.2f} windows/s, {format_seconds(eta)} left", last=False)

    def finish(self) -> None:
        """Report how long it took."""
        self._say(f"done in {format_seconds(time.monotonic() - self._started)}", last=True)

    def _say(self, text: str, *, last: bool) -> None:
        self._progress._write(f"kld: {self._name}: {self._done}/{self._total} windows, {text}", last=last)


def format_seconds(seconds: float) -> str:
    """Return a duration in a readable form."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def tables(results: Sequence[GateResult]) -> list[str]:
    """Return the lines of the final table; with suite files, of a table for each."""
    lines: list[str] = []
    for group in by_suite(results):
        lines += [*([""] if lines else []), *table(group)]
    return lines


def table(results: Sequence[GateResult]) -> list[str]:
    """Return the lines of a table: a row per candidate, followed by a row per dataset if there are several."""
    columns = [
        "Model",
        "Mean KLD",
        "Median KLD",
        "P95 KLD",
        "P99 KLD",
        "Max KLD",
        "NaN",
        "Top-1",
        "Verdict",
        "Band",
    ]
    groups = by_candidate(results)
    rows = [row for candidate, group in groups.items() for row in _rows(candidate, group)]
    lines = [_title(results), *aligned([columns, *rows], left=(0, 8, 9))]
    if sure := [row for candidate, group in groups.items() for row in _interval_rows(candidate, group)]:
        lines += ["", *aligned([["Model", "Windows", *(heading for heading, _ in _INTERVALS)], *sure], left=(0,))]
    more = [row for candidate, group in groups.items() for row in _extended_rows(candidate, group)]
    if more:
        lines += ["", *aligned([["Model", *(heading for heading, _, _ in _EXTENDED)], *more], left=(0,))]
    if gaps := [row for candidate, group in groups.items() for row in _gap_rows(candidate, group)]:
        lines += ["", *aligned([["Model", "Prefill to decode", "Reference's own"], *gaps], left=(0,))]
    if floors := floor_rows(results):
        lines += ["", *aligned(floors, left=(0,))]
    if changed := [row for candidate, group in groups.items() for row in _change_rows(candidate, group)]:
        lines += ["", *aligned([list(_CHANGES), *changed], left=(0, 1, 7))]
    if any(result.speed for result in results):
        lines += ["", *_speed(results)]
    return lines


def _speed(results: Sequence[GateResult]) -> list[str]:
    from pytest_kld.report.speed import check_lines, latency_rows, measured_speeds, speed_title, throughput_rows

    speeds = measured_speeds(results)
    return [
        plain(speed_title(speeds)),
        *aligned(throughput_rows(speeds), left=(0,)),
        "",
        *aligned(latency_rows(speeds), left=(0,)),
        *(plain(line) for line in dict.fromkeys(check_lines(results))),
    ]


_CHANGES = ("Model", "Figure", "Now", "Baseline", "Change", "Change interval", "Allowed", "Verdict")
"""Headings of the table of changes against baselines."""


_EXTENDED = (
    ("Reverse KLD", "reverse_kl", ".6f"),
    ("JS", "js", ".6f"),
    ("TV", "tv", ".6f"),
    ("Top-5", "top5_overlap", ".2%"),
    ("Flips", "flips", ".2%"),
    ("RMS dp", "rms_delta_p", ".2%"),
    ("ln PPL ratio", "log_ppl_ratio", "+.6f"),
    ("Entropy", "entropy_difference", "+.6f"),
)
"""Heading, figure and format of the columns of the second table."""


_INTERVALS = (
    ("Mean KLD interval", "mean"),
    ("P99 KLD interval", "p99"),
    ("Top-1 interval", "top1_agreement"),
)
"""Heading and figure of the columns of the table of intervals."""


def _title(results: Sequence[GateResult]) -> str:
    references = {result.reference.label for result in results}
    title = f"KLD Evaluation Results (ref: {references.pop() if len(references) == 1 else results[0].reference.name}"
    measured = next((result for result in results if result.figures and result.about), None)
    if measured and measured.figures and measured.about:
        average = "macro average of " if len(measured.datasets) > 1 else ""
        title += f", dataset: {average}{measured.about['protocol']['dataset']}"
        title += f", {measured.figures['positions']:,} positions"
        if measured.figures["skipped"]:
            title += f", {measured.figures['skipped']:,} of them skipped"
    return f"{title})"


def aligned(rows: list[list[str]], left: tuple[int, ...]) -> list[str]:
    """Return the lines of a table: a heading, a rule and the other rows; `left` are the columns flush left."""
    rows = [[plain(cell) for cell in row] for row in rows]  # escape before measuring widths
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def notes(results: Sequence[GateResult]) -> list[str]:
    """Return the lines under the table, each once."""
    return list(dict.fromkeys(f"note: {note}" for result in results for note in result.notes))


def what_is_missing(incomplete: Incomplete | None) -> list[str]:
    """Return the lines that say that the table is incomplete, and that name the missing tests."""
    if incomplete is None:
        return []
    return [f"INCOMPLETE: {incomplete}:", *(f"  {nodeid}" for nodeid in incomplete.not_measured)]


def _verdict(result: GateResult) -> str:
    if result.xfail and result.outcome == "failed":
        return "xfail"
    word = {"passed": "pass", "skipped": "skip", "failed": "FAIL", "error": "ERROR"}[result.outcome]
    return f"{word} (inconclusive)" if result.inconclusive else word


def _rows(candidate: str, group: Sequence[GateResult]) -> list[list[str]]:
    verdict = _verdict(worst(group))
    result = next((result for result in group if result.figures), None)
    if result is None or result.figures is None:
        return [[candidate, *["-"] * 7, verdict, "-"]]
    rows = [[candidate, *_cells(result.figures, result.below_floor), verdict, result.band or "-"]]
    if len(result.datasets) > 1:
        rows += [
            [f"  {name}", *_cells(figures, result.below_floor_on(name)), "", band(figures["mean"])]
            for name, figures in result.datasets.items()
        ]
    return rows


def _interval_rows(candidate: str, group: Sequence[GateResult]) -> list[list[str]]:
    """Return a row for each test, because tests may have used different numbers of windows."""
    rows = [[f"{result.windows:,}", *_interval_cells(result)] for result in group if result.intervals]
    return [[candidate, *row] for index, row in enumerate(rows) if row not in rows[:index]]


def _interval_cells(result: GateResult) -> list[str]:
    known = [result.intervals[name] for _, name in _INTERVALS]
    return [f"[{interval['low']:.6f}, {interval['high']:.6f}]" for interval in known]


def _change_rows(candidate: str, group: Sequence[GateResult]) -> list[list[str]]:
    """Return a row for each figure beside its baseline. Tests of one candidate may allow different changes."""
    rows = [_change_row(candidate, change) for result in group for change in result.changes]
    return [row for index, row in enumerate(rows) if row not in rows[:index]]


def _change_row(candidate: str, change: dict[str, Any]) -> list[str]:
    share = "" if change["share"] is None else f" ({change['share']:+.1%})"
    interval = change["interval"]
    word = {"pass": "ok", "fail": "REGRESSION", "inconclusive": "undecided"}[change["state"]]
    return [
        candidate,
        change["label"],
        f"{change['value']:.6f}",
        f"{change['before']:.6f}",
        f"{MARK if change['below_floor'] else ''}{change['difference']:+.6f}{share}",
        "-" if interval is None else f"[{interval['low']:+.6f}, {interval['high']:+.6f}]",
        "-" if change["bound"] is None else f"{change['bound']:.6f}",
        "-" if change["bound"] is None else word,
    ]


def _cells(figures: dict[str, Any], below: Sequence[str]) -> list[str]:
    nan = f"{figures['candidate_nan_count']:,}"
    if figures["reference_nan_count"]:
        nan += f" (ref {figures['reference_nan_count']:,})"
    return [
        *(marked(f"{figures[name]:.6f}", name, below) for name in ("mean", "median", "p95", "p99")),
        marked(f"{figures['max']:.4f}", "max", below),
        nan,
        marked(f"{figures['top1_agreement']:.2%}", "top1_agreement", below),
    ]


def _gap_rows(candidate: str, group: Sequence[GateResult]) -> list[list[str]]:
    """Return the mean KL of prefill and decode of a candidate against itself, and that of the reference."""
    names = ("decode_gap", "reference_decode_gap")
    result = next((one for one in group if one.figures and one.figures.get(names[0]) is not None), None)
    if result is None or (gaps := result.figures) is None:
        return []
    texts = {name: "-" if gaps[name] is None else f"{gaps[name]:.3g}" for name in names}
    return [[candidate, *(marked(text, name, result.below_floor) for name, text in texts.items())]]


def _extended_rows(candidate: str, group: Sequence[GateResult]) -> list[list[str]]:
    result = next((result for result in group if result.figures and result.figures["js"] is not None), None)
    if result is None or result.figures is None:
        return []
    datasets = result.datasets if len(result.datasets) > 1 else {}
    rows = [(candidate, result.figures, result.below_floor)]
    rows += [(f"  {name}", figures, result.below_floor_on(name)) for name, figures in datasets.items()]
    return [[name, *(_extended_cell(figures, *column, below) for column in _EXTENDED)] for name, figures, below in rows]


def _extended_cell(figures: dict[str, Any], _: str, figure: str, form: str, below: Sequence[str]) -> str:
    value = figures[figure]
    return "-" if value is None else marked(format(value, form), figure, below)
