"""Parses numbers that users write. It is stricter than Python, which also accepts `1_0`, `١`, `nan` and any length."""

from __future__ import annotations

import re

_WHOLE = re.compile("[0-9]{1,4000}")  # Python reads at most 4,300 digits
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SHOWN = 40
"""The number of characters of an invalid value that a message shows."""


def whole_number(text: str) -> int | None:
    """Return a whole number in ASCII digits, or None if the text is not one."""
    return int(text) if _WHOLE.fullmatch(text) else None


def decimal_number(text: str) -> float | None:
    """Return a number in decimal notation, e.g. `0.05` or `1e-3`; None if the text is not one. It may be infinite."""
    return float(text) if _DECIMAL.fullmatch(text) else None


def shown(value: object) -> str:
    """Return an invalid value for a message: its repr, cut to a readable length."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print the digits of very long integers
        return f"a whole number of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
