"""Makes text from outside safe to display: names of models, messages, tokens, corpora.

Such text may contain characters that a terminal obeys (escape sequences), that reverse lines (bidirectional overrides),
that are invisible (zero-width characters), or that no encoding can write (half of a surrogate pair, which is how Python
represents a file name that is not UTF-8). Internally it is kept unchanged; it passes through `plain` when it is shown.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache

LINES = "\n\t"
"""The characters to keep in a text of several lines."""

_UNSAFE = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
"""Unicode categories: controls, formats, surrogates, unassigned, private use, line and paragraph separators."""
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks of other categories that are displayed as nothing."""
_SECRET_WORDS = frozenset({"KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"})
_DIGEST_CHARACTERS = 12
_SUSPECT = re.compile(r"[^\x20-\x7e]")
_COMMAND = re.compile(r"^(\s*):(?=:)|#(?=#\w*\[)", flags=re.MULTILINE)
"""What makes a line of a log a command to a CI runner: `::error::` at its start (GitHub), and `##[error]` (GitHub),
`##vso[…]` (Azure) and `##teamcity[…]` anywhere."""


def plain(text: str, keep: str = "") -> str:
    r"""Return text with each unsafe character written as a Python escape: `\x1b`, `\u202e`, `\udcff`.

    So is the first character of what a CI runner would take for a command: `\x3a:error::`, `\x23#[error]`.
    Escaping twice changes nothing.

    Args:
        text: any text.
        keep: characters to leave unchanged; `LINES` for a text of several lines.

    """
    shown = _SUSPECT.sub(lambda match: match[0] if match[0] in keep else _shown(match[0]), text)
    return _COMMAND.sub(lambda match: _escape("#") if match[0] == "#" else f"{match[1]}{_escape(':')}", shown)


def show_token(text: str) -> str:
    """Make the spaces and control characters of a token visible."""
    shown = {" ": "␣", "\n": "↵"}
    return "".join(shown.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in text)


def in_code_span(text: str) -> str:
    r"""Return text as a code span of Markdown, in which nothing is markup, for a paragraph, a list or a table.

    A grave accent would end the span and a bar the cell of a table, so they are spelled out: `\x60`, `\x7c`. GitHub
    makes no links or mentions of what is in a code span.
    """
    return f"`{plain(text).replace('`', _escape('`')).replace('|', _escape('|')) or ' '}`"


def _escape(char: str) -> str:
    return f"\\x{ord(char):02x}"


def secret_digest(name: str, value: str) -> str:
    """Return a variable's value, or its digest if the name suggests a secret."""
    if _SECRET_WORDS.isdisjoint(name.upper().split("_")):
        return value
    import hashlib

    return f"sha256:{hashlib.sha256(value.encode(errors='surrogateescape')).hexdigest()[:_DIGEST_CHARACTERS]}"


def without_surrogates(text: str) -> str:
    r"""Return text with only its lone surrogates escaped: `\udcff`. Every Unicode encoding can write the result."""
    return text.encode(errors="backslashreplace").decode()


def json_escaped(text: str) -> str:
    r"""Return JSON with each unsafe character, except line feeds and tabs, written as a JSON escape.

    So is the first character of what a CI runner would take for a command: `\u0023#[error]`. In the output of
    `json.dumps(..., ensure_ascii=False)` all of these occur only inside strings, so the JSON keeps its meaning:
    `\u202e` is read back as the original character.
    """
    shown = _SUSPECT.sub(lambda match: match[0] if match[0] in LINES else _in_json(match[0]), text)
    return _COMMAND.sub(lambda match: match[0].replace("#", r"\u0023").replace(":", r"\u003a"), shown)


def _in_json(char: str) -> str:
    return char if _shown(char) == char else json.dumps(char)[1:-1]


@cache
def _shown(char: str) -> str:
    unsafe = unicodedata.category(char) in _UNSAFE or char in _BLANK
    return char.encode("unicode_escape").decode() if unsafe else char
