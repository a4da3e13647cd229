"""The HTML report: one file with charts and tables that needs no network."""

from __future__ import annotations

import base64
import hashlib
import math
from datetime import UTC, datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pytest_kld import __version__
from pytest_kld.files import write_report
from pytest_kld.plain import LINES, plain, show_token
from pytest_kld.report.floor import EXPLANATION
from pytest_kld.report.saw import saw_rows
from pytest_kld.report.view import view

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_kld.gate.matrix import MatrixResult
    from pytest_kld.gate.result import GateResult, Incomplete, Shard

_ASSETS = files("pytest_kld.report") / "assets"
_LIBRARIES = ("d3", "plot")
"""Charting libraries in loading order; both are under the ISC licence, whose text is included with them."""


def write_html_report(
    path: Path,
    results: Sequence[GateResult],
    incomplete: Incomplete | None = None,
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> None:
    """Write the report completely or not at all.

    Raises:
        ReportError: the file cannot be written.

    """
    write_report(path, render(results, incomplete, shard, matrices).encode())


def render(
    results: Sequence[GateResult],
    incomplete: Incomplete | None = None,
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> str:
    """Return the report as HTML. Text from outside is escaped, including its control characters."""
    report = view(results, matrices)
    scripts = [*(_library(name) for name in _LIBRARIES), _asset("charts.js")]
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            floor_explanation=EXPLANATION,
            incomplete=incomplete,
            shard=shard,
            chart_data=_chart_data(report.chart_data()),
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            version=__version__,
            style=Markup(_asset("report.css")),  # noqa: S704 (our own file)
            scripts=[Markup(script) for script in scripts],  # noqa: S704 (our own file and the libraries)
            policy=_policy(scripts),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pytest_kld.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=lambda value: _number(value, ".6f"),
        brief=lambda value: _number(value, ".4g"),
        percent=lambda value: _number(value, ".2%"),
        exact=lambda value: _number(value, "," if isinstance(value, int) else ".6g"),
        token=show_token,
        saw_rows=saw_rows,
    )
    return environment


def _number(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return "–"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else format(value, form).replace("-", "−")


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: the scripts in the file run, and nothing else is run or loaded.

    Inline styles are allowed anywhere, because the charts add their own; they cannot load anything either. The only
    images are the colour scales that the charts draw.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


def _library(name: str) -> str:
    return f"/*\n{_asset(f'vendor/{name}.LICENSE')}*/\n{_asset(f'vendor/{name}.min.js')}"


def _asset(name: str) -> str:
    return _ASSETS.joinpath(name).read_text(encoding="utf-8")


def _chart_data(value: Any) -> Any:
    """Escape control characters, and replace numbers that JSON lacks with null: only tables show these numbers."""
    if isinstance(value, dict):
        return {name: _chart_data(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_chart_data(item) for item in value]
    if isinstance(value, str):
        return plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> Any:
    """Escape control characters in everything that the template inserts, except its own markup."""
    return plain(value, keep=LINES) if isinstance(value, str) and not isinstance(value, Markup) else value
