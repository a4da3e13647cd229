"""Numbers as users write them: stricter than Python, which also takes `1_0`, `١`, `nan` and any length."""

from __future__ import annotations

import re

_WHOLE = re.compile("[0-9]{1,4000}")  # Python reads 4,300 digits
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SHOWN = 40
"""Characters of a wrong value that a message shows."""


def whole_number(text: str) -> int | None:
    """Return a whole number of ASCII digits, or None if the text is none."""
    return int(text) if _WHOLE.fullmatch(text) else None


def decimal_number(text: str) -> float | None:
    """Return a number in decimal notation, e.g. `0.05` or `1e-3`; None if the text is none. It may be infinite."""
    return float(text) if _DECIMAL.fullmatch(text) else None


def shown(value: object) -> str:
    """Return a wrong value for a message: as Python writes it, cut to a length that can be read."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write the digits of very long ones
        return f"a whole number of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
