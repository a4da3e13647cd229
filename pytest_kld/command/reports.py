"""What `compare` and `report` share: limits for scores, and every report of results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytest_kld.command.output import Exit, Failed, print_lines
from pytest_kld.errors import ReportError
from pytest_kld.plain import LINES, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_kld.figures.scores import Scores
    from pytest_kld.gate.matrix import MatrixResult
    from pytest_kld.gate.result import GateResult, Incomplete, Outcome

_OUTCOMES: dict[str, Outcome] = {"pass": "passed", "fail": "failed", "inconclusive": "failed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """How scores are judged.

    Attributes:
        limits: the bounds that were given, by limit.
        confidence: the level of the intervals that are compared with the limits; None compares the figures.
        skip_first: positions at the start of each window that the figures leave out.
        each_dataset: whether the limits hold for each dataset too.

    """

    limits: dict[str, float]
    confidence: float | None
    skip_first: int
    each_dataset: bool

    @property
    def given(self) -> bool:
        """Whether anything was asked for."""
        return self != Judging(limits={}, confidence=None, skip_first=0, each_dataset=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """The reports to write; None or False: not wanted. A path `-` is standard output."""

    json: Path | None
    html: Path | None
    junit: Path | None
    markdown: Path | None
    original: bool
    title: str | None


def _limit(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, float]:  # noqa: ARG001
    from pytest_kld.gate.limits import LIMITS

    limits = {}
    for text in values:
        name, _, bound = text.partition("=")
        limit = LIMITS.get(name.strip().replace("-", "_"))
        if limit is None:
            raise click.BadParameter(f"expected NAME=BOUND with a name of {', '.join(LIMITS)}, got {text!r}")
        try:
            limits[limit.name] = limit.parse(bound.strip())
        except ValueError as error:
            raise click.BadParameter(f"{limit.name}: {error}") from None
    return limits


def _parsed(parse: Callable[[str, Path], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    def convert(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:  # noqa: ARG001
        try:
            return None if value is None else parse(value, Path.cwd())
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def _confidence(text: str, base: Path) -> float:
    from pytest_kld.settings.parsers import confidence

    return confidence(text, base)


def _report_file(text: str, base: Path) -> Path:
    from pytest_kld.settings.parsers import report_file

    return Path(text) if text == "-" else report_file(text, base)


_JUDGING = (
    click.option("--limit", "limits", metavar="NAME=BOUND", multiple=True, callback=_limit, help="Limit, named like a "
                 "marker's argument: max_mean=0.05. Repeatable. max_nan, max_ref_nan and max_cut_mass have defaults."),
    click.option("--confidence", metavar="X", callback=_parsed(_confidence), help="As --kld-confidence."),
    click.option("--skip-first", metavar="N", type=click.IntRange(min=0), default=0, help="As --kld-skip-first."),
    click.option("--each-dataset", is_flag=True, help="As --kld-each-dataset."),
)  # fmt: skip
_OUTPUTS = (
    click.option("--json", metavar="FILE", callback=_parsed(_report_file), help="Write a JSON report (-: print it)."),
    click.option("--html", metavar="FILE", callback=_parsed(_report_file), help="Write an HTML report."),
    click.option("--junit", metavar="FILE", callback=_parsed(_report_file), help="Write a JUnit report."),
    click.option("--markdown", metavar="FILE", callback=_parsed(_report_file), help="Write a Markdown summary."),
    click.option("--original", is_flag=True, help="Print the tables of the original scripts."),
    click.option("--title", metavar="TEXT", help="With --original: the line above the table."),
)


def judging_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `Judging`, passed as `judging`."""
    return _gathered(function, _JUDGING, "judging", Judging)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `Outputs`, passed as `outputs`."""
    return _gathered(function, _OUTPUTS, "outputs", Outputs)


def _gathered(function: Callable[..., Any], options: Sequence[Any], name: str, kind: type) -> Callable[..., Any]:
    from dataclasses import fields
    from functools import wraps

    @wraps(function)
    def wrapper(**given: Any) -> Any:
        own = {one.name: given.pop(one.name) for one in fields(kind)}
        return function(**given, **{name: kind(**own)})

    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper


def result_of(scores: Scores, name: str, judging: Judging) -> GateResult:
    """Judge scores as a gate would.

    Args:
        scores: the table of one pair.
        name: stands for the test's node id.
        judging: the limits and how they are applied.

    Raises:
        ScoresError: nothing was measured, or a figure that has a limit is missing.

    """
    from pytest_kld.collecting.kld import KLD
    from pytest_kld.diagnosis import diagnose
    from pytest_kld.gate.limits import DEFAULT_BOUNDS, merge_bounds
    from pytest_kld.gate.result import GateResult

    size = scores.about["protocol"]["window_size"]
    if judging.skip_first > size - 2:
        raise Failed(f"--skip-first {judging.skip_first} leaves no position of a window of {size} tokens to measure")
    bounds = merge_bounds(dict(judging.limits), dict(DEFAULT_BOUNDS))
    kld = KLD(
        reference=scores.subject("reference"),
        candidate=scores.subject("candidate"),
        bounds=bounds,
        scores=scores.without_first(judging.skip_first),
        each_dataset=judging.each_dataset,
        confidence=judging.confidence,
    )
    kld.diagnosis = diagnose(kld.scores)
    outcome = _OUTCOMES[kld.verdict().state]
    return GateResult(
        nodeid=name,
        reference=kld.subjects["reference"],
        candidate=kld.subjects["candidate"],
        outcome=outcome,
        message="" if outcome == "passed" else kld.explain(),
        body_passed=True,
        **kld.measured(profile=True),
    )


def deliver(
    results: Sequence[GateResult],
    incomplete: Incomplete | None,
    outputs: Outputs,
    matrices: Sequence[MatrixResult] = (),
) -> Exit:
    """Print the tables, write the reports, and return the exit code.

    Raises:
        ReportError: a report cannot be written, or cannot show these results.

    """
    from pytest_kld.gate.result import by_suite
    from pytest_kld.report import markdown
    from pytest_kld.report.html import render
    from pytest_kld.report.json_file import json_report
    from pytest_kld.report.junit import junit_report
    from pytest_kld.report.merge import by_comparison

    suites = [by_comparison(group) for group in by_suite(results)]
    for groups in suites:
        _require_one_comparison(groups, outputs)
    if Path("-") not in (outputs.json, outputs.html, outputs.junit, outputs.markdown):
        _show([group for groups in suites for group in groups], matrices, incomplete, outputs)
    _write(outputs.json, lambda: json_report(results, incomplete, matrices=matrices))
    _write(outputs.junit, lambda: junit_report(results, matrices=matrices))
    _write(outputs.html, lambda: render(results, incomplete, matrices=matrices).encode())
    _write(outputs.markdown, lambda: markdown.render(results, incomplete, matrices=matrices).encode())
    good = not incomplete and all(result.outcome in ("passed", "skipped") or result.xfail for result in results)
    good = good and all(matrix.outcome in ("passed", "skipped") for matrix in matrices)
    return Exit.IN_ORDER if good else Exit.NOT_IN_ORDER


def _require_one_comparison(groups: Sequence[Sequence[GateResult]], outputs: Outputs) -> None:
    if len(groups) > 1 and (outputs.html or outputs.junit):
        heads = [f"{group[0].reference.label}: {_protocol(group)}" for group in groups]
        raise ReportError(
            "the HTML and the JUnit report show one reference and one protocol, and these results have "
            f"{len(groups)}: {'; '.join(heads)}. Report them one by one."
        )


def _protocol(group: Sequence[GateResult]) -> str:
    about = next((result.about for result in group if result.about), None)
    if about is None:
        return "nothing measured"
    protocol = about["protocol"]
    return (
        f"{protocol['dataset']}, {protocol['windows']} windows of {protocol['window_size']} tokens at stride "
        f"{protocol['stride']}, first {about.get('skip_first', 0)} skipped, head {about.get('head')}"
    )


def _show(
    groups: Sequence[Sequence[GateResult]],
    matrices: Sequence[MatrixResult],
    incomplete: Incomplete | None,
    outputs: Outputs,
) -> None:
    from pytest_kld.report import original, terminal
    from pytest_kld.report.matrix import matrix_lines

    for group in groups:
        if outputs.original:
            print_lines([*original.table(group, title=outputs.title), ""])
            continue
        print_lines([*terminal.table(group), *terminal.notes(group), ""])
        for result in group:
            if result.message:
                click.echo(f"{plain(result.nodeid)}: {plain(result.message, keep=LINES)}\n")
    print_lines(matrix_lines(matrices))
    for matrix in matrices:
        if matrix.message and matrix.pairs:  # an error is in its lines
            click.echo(f"{plain(matrix.nodeid)}: {plain(matrix.message, keep=LINES)}\n")
    for line in terminal.what_is_missing(incomplete):
        click.secho(plain(line), fg="red")


def _write(path: Path | None, made: Callable[[], bytes]) -> None:
    from pytest_kld.files import write_report

    if path is None:
        return
    if path == Path("-"):
        click.echo(made(), nl=False)
    else:
        write_report(path, made())
