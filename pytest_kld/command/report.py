"""`pytest-kld report`: every report again, from scores or from JSON reports."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from pytest_kld.command.output import existing
from pytest_kld.command.reports import deliver, judging_options, output_options, result_of
from pytest_kld.errors import ReportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_kld.command.reports import Judging, Outputs


@click.command(
    epilog="Exit codes: 0 if every gate passed, 1 if one failed, was not measured, or is missing, 2 if there is no "
    "report, because a file cannot be read or written or an argument is wrong."
)
@click.argument("files", nargs=-1, required=True, type=existing, metavar="SCORES|JSON...")
@click.option("--latest", is_flag=True, help="Take a test that several JSON reports hold from the latest of them.")
@judging_options
@output_options
@click.pass_context
def report(context: click.Context, files: tuple[Path, ...], latest: bool, judging: Judging, outputs: Outputs) -> None:
    """Print and write the reports of earlier runs again, merged into one.

    The arguments are JSON reports of --kld-json, such as those of the shards of a release, or scores: .safetensors
    files in `scores` in the cache directory, or from `pytest-kld compare --scores`. A JSON report keeps the verdicts
    of its session. Scores are judged by the limits given here. Nothing is measured.
    """
    from pytest_kld.figures.scores import Scores
    from pytest_kld.report.json_file import read_json_report
    from pytest_kld.report.merge import merge

    tables = [path for path in files if path.suffix == ".safetensors"]
    if judging.given and len(tables) < len(files):
        raise click.UsageError(
            "--limit, --confidence, --skip-first and --each-dataset apply to scores; a JSON report has the verdicts of "
            "its session"
        )
    with _describing_fields():
        merged = merge([read_json_report(path) for path in files if path not in tables], latest=latest)
        results = [*merged.results, *(result_of(Scores.load(path), str(path), judging) for path in tables)]
        code = deliver(results, merged.incomplete, outputs, merged.matrices)
    context.exit(code)


@contextmanager
def _describing_fields() -> Iterator[None]:
    """Report what cannot be shown as a mistake in the files: they may come from elsewhere, with fields of other types.

    Raises:
        ReportError: a field has another type than pytest-kld writes.

    """
    from jinja2 import TemplateError

    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
        TemplateError,
    ) as error:
        raise ReportError(
            f"the files cannot be reported: a field has another type than pytest-kld writes ({error!r})"
        ) from error
