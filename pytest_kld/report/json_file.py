"""The JSON report. Its schema is docs/report.schema.json."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pytest_kld import __version__
from pytest_kld.files import json_bytes, write_report
from pytest_kld.plain import without_surrogates

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_kld.gate.result import GateResult, Incomplete

SCHEMA_VERSION = 2
"""Incremented when a field is renamed, removed, or changes its meaning."""


def write_json_report(path: Path, results: Sequence[GateResult], incomplete: Incomplete | None = None) -> None:
    """Write everything known about each gated test, and what is missing if the session ended early.

    Raises:
        ReportError: the file cannot be written.

    """
    report = {
        "schema_version": SCHEMA_VERSION,
        "pytest_kld": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "incomplete": incomplete and asdict(incomplete),
        "results": [_described(result) for result in results],
    }
    write_report(path, json_bytes(_portable(report)))


def _described(result: GateResult) -> dict[str, Any]:
    data = {**result.to_json(), "band": result.band, "notes": result.notes}
    data["subjects"] = {side: data[side] for side in ("reference", "candidate")}
    data |= {"reference": result.reference.label, "candidate": result.candidate.label}
    del data["profile"]  # used only by charts
    return data


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
