"""The JSON report. Its schema is docs/report.schema.json."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pytest_kld import __version__
from pytest_kld.files import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_kld.gate.result import GateResult

SCHEMA_VERSION = 2
"""Raised whenever a field is renamed, removed, or changes its meaning."""


def write_json_report(path: Path, results: Sequence[GateResult]) -> None:
    """Write everything that is known of each gated test."""
    write_json(
        path,
        {
            "schema_version": SCHEMA_VERSION,
            "pytest_kld": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "results": [_json_numbers(_described(result)) for result in results],
        },
    )


def _described(result: GateResult) -> dict[str, Any]:
    data = {**result.to_json(), "band": result.band, "notes": result.notes}
    data["subjects"] = {side: data[side] for side in ("reference", "candidate")}
    data |= {"reference": result.reference.label, "candidate": result.candidate.label}
    del data["profile"]  # there for charts alone
    return data


def _json_numbers(value: Any) -> Any:
    """Write numbers that JSON lacks as the strings `nan`, `inf` and `-inf`."""
    if isinstance(value, dict):
        return {name: _json_numbers(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
