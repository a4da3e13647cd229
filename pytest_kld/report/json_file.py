"""The JSON report, written and read again. Its schema is docs/report.schema.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, get_args

from pytest_kld import __version__
from pytest_kld.errors import ReportError
from pytest_kld.figures.scores import Summary
from pytest_kld.files import json_bytes, write_report
from pytest_kld.gate.matrix import MatrixResult
from pytest_kld.gate.result import GateResult, Incomplete, Outcome, Shard
from pytest_kld.plain import without_surrogates

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCHEMA_VERSION = 2
"""Incremented when a field is renamed, removed, or changes its meaning."""


_NOT_FINITE = ("nan", "inf", "-inf")
_MADE_FROM_OTHERS = ("band", "notes", "subjects")
"""Fields of a result in the report that a GateResult does not store."""
_TEXTS = frozenset(
    (
        *("limit", "figure", "dataset", "state", "name", "explanation", "evidence", "class", "text", "label_text"),
        *(
            "context",
            "label",
            "allowed",
            "file",
            "created",
            "made_from",
            "notes",
            "server",
            "tool",
            "raw",
            "base_label",
            "first",
            "second",
        ),
    )
)
"""Fields whose texts stay texts, even if they read like a number: a token's text may be `nan`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JSONReport:
    """A JSON report that was read.

    Attributes:
        path: the file.
        created: when it was written, in ISO 8601.
        results: the results of its tests.
        incomplete: what is missing if the session ended early.
        matrices: its matrices.
        shard: which shard the session was, or None.

    """

    path: Path
    created: str
    results: tuple[GateResult, ...]
    incomplete: Incomplete | None
    matrices: tuple[MatrixResult, ...] = ()
    shard: Shard | None = None


def write_json_report(
    path: Path,
    results: Sequence[GateResult],
    incomplete: Incomplete | None = None,
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> None:
    """Write everything known about each gated test and each matrix.

    If the session ended early, the report says what is missing. It names the shard.

    Raises:
        ReportError: the file cannot be written.

    """
    write_report(path, json_report(results, incomplete, shard, matrices))


def json_report(
    results: Sequence[GateResult],
    incomplete: Incomplete | None = None,
    shard: Shard | None = None,
    matrices: Sequence[MatrixResult] = (),
) -> bytes:
    """Return the report as JSON in UTF-8."""
    report = {
        "schema_version": SCHEMA_VERSION,
        "pytest_kld": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "shard": shard and asdict(shard),
        "incomplete": incomplete and asdict(incomplete),
        "results": [_described(result) for result in results],
        "matrices": [_described_matrix(matrix) for matrix in matrices],
    }
    return json_bytes(_portable(report), sort=False)  # a label has the values of the axes in their order


def read_json_report(path: Path) -> JSONReport:
    """Read a report.

    Raises:
        ReportError: the file cannot be read, is not a JSON report of pytest-kld, or is one of another schema.

    """
    try:
        report = json.loads(path.read_bytes())
        version = report["schema_version"]
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ReportError(f"{path} is not a JSON report of pytest-kld (--kld-json): {error!r}") from error
    if version != SCHEMA_VERSION:
        raise ReportError(
            f"{path} has schema_version {version!r}, and this is pytest-kld {__version__}, which reads "
            f"{SCHEMA_VERSION}: make the report again"
        )
    try:
        incomplete = report["incomplete"]
        if incomplete is not None:
            incomplete = Incomplete(**{**incomplete, "not_measured": tuple(incomplete["not_measured"])})
        shard = None if report["shard"] is None else Shard(**report["shard"])
        results = tuple(_result(data) for data in report["results"])
        return JSONReport(
            path=path,
            created=str(report["created"]),
            results=results,
            incomplete=incomplete,
            matrices=tuple(_matrix(data) for data in report["matrices"]),
            shard=shard,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReportError(f"{path} is damaged: it lacks a field, or one has another type ({error!r})") from error


def _result(data: dict[str, Any]) -> GateResult:
    """Create a result from `_described`'s output, and require that it describes the same again."""
    read = {**data, **data["subjects"]}
    for name in _MADE_FROM_OTHERS:
        del read[name]
    for name in ("figures", "intervals", "checks", "diagnosis", "profile", "baseline", "speed", "floor"):
        read[name] = _numbers(read[name])
    read["datasets"] = {name: _numbers(figures) for name, figures in read["datasets"].items()}
    result = GateResult.from_json(read)
    again = _portable(_described(result))
    if wrong := [name for name in data if name not in ("band", "notes") and again[name] != data[name]]:
        raise ValueError(f"{wrong[0]} of {result.nodeid} contradicts the rest")
    if result.outcome not in get_args(Outcome):
        raise ValueError(f"{result.nodeid} has the outcome {result.outcome!r}")
    for figures in (result.figures, *result.datasets.values()):
        if figures is not None and figures.keys() != {one.name for one in fields(Summary)}:
            raise ValueError(f"{result.nodeid} has other figures than this version")
    return result


def _matrix(data: dict[str, Any]) -> MatrixResult:
    """Create a matrix from `_described_matrix`'s output, and require that it describes the same again."""
    read = {**data, "reference": data["subjects"]["reference"], "members": data["subjects"]["members"]}
    del read["subjects"]
    result = MatrixResult.from_json({**read, "pairs": _numbers(read["pairs"])})
    if _portable(_described_matrix(result)) != data:
        raise ValueError(f"the matrix {result.nodeid} contradicts itself")
    return result


def _numbers(value: Any) -> Any:
    """Turn the texts of numbers that JSON lacks into these numbers."""
    if isinstance(value, dict):
        return {name: item if name in _TEXTS else _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def _described(result: GateResult) -> dict[str, Any]:
    data = {**result.to_json(), "band": result.band, "notes": result.notes}
    data["subjects"] = {side: data[side] for side in ("reference", "candidate")}
    return data | {"reference": result.reference.label, "candidate": result.candidate.label}


def _described_matrix(matrix: MatrixResult) -> dict[str, Any]:
    data = matrix.to_json()
    data["subjects"] = {side: data[side] for side in ("reference", "members")}
    labels = {"reference": matrix.reference.label, "members": [member.label for member in matrix.members]}
    return data | labels


def _portable(value: Any) -> Any:
    """Write numbers that JSON lacks as the strings `nan`, `inf` and `-inf`, and escape lone surrogates in the text.

    JSON has an escape for lone surrogates, but many readers would reject the whole report because of it.
    """
    if isinstance(value, dict):
        return {_portable(name): _portable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, str):
        return without_surrogates(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
