"""Spell out the control characters of names and messages in what pytest shows of a test that did not pass."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from _pytest._code.code import TerminalRepr

from pytest_kld.plain import LINES, plain

if TYPE_CHECKING:
    import pytest


def escape_failure(report: pytest.TestReport) -> None:
    """Spell out control characters in a report's failure and in what was captured; the outcome stays as it is."""
    report.longrepr = _escaped(report.longrepr)
    report.sections = [(title, plain(_last_written(text), keep=LINES)) for title, text in report.sections]


def _escaped(value: Any) -> Any:
    """Escape every text in pytest's representation of an exception: a text, a location and reason, or a traceback."""
    if isinstance(value, str):
        return plain(value, keep=LINES)
    if isinstance(value, tuple | list):
        return type(value)(_escaped(part) for part in value)
    if isinstance(value, TerminalRepr) and is_dataclass(value):
        for field in fields(value):
            setattr(value, field.name, _escaped(getattr(value, field.name)))
    return value


def _last_written(text: str) -> str:
    """Return what a terminal would show after lines were overwritten, as progress bars do."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
