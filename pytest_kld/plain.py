"""Text that is not ours, made safe to show: names of models, messages, tokens, corpora.

Such text may hold what a terminal obeys (escape sequences), what turns lines around (bidirectional overrides), what
nobody sees (zero-width characters), or what no encoding can write (half of a surrogate pair, which is how Python keeps
a file name that is not UTF-8). It is kept as it is inside, and passes through `plain` where it is shown.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache

LINES = "\n\t"
"""What to keep of a text of several lines."""

_UNSAFE = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
"""Unicode's categories of controls, formats, surrogates, what is unassigned or private, and ends of lines."""
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks that show nothing and are of other categories."""
_SECRET_WORDS = frozenset({"KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"})
_DIGEST_CHARACTERS = 12
_SUSPECT = re.compile(r"[^\x20-\x7e]")


def plain(text: str, keep: str = "") -> str:
    r"""Return text with each character that is no text spelled out, as Python spells it: `\x1b`, `\u202e`, `\udcff`.

    Escaping twice changes nothing.

    Args:
        text: any text.
        keep: characters to leave as they are; `LINES` for a text of several lines.

    """
    return _SUSPECT.sub(lambda match: match[0] if match[0] in keep else _shown(match[0]), text)


def secret_digest(name: str, value: str) -> str:
    """Return a variable's value, or a digest of it if its name says that it is a secret."""
    if _SECRET_WORDS.isdisjoint(name.upper().split("_")):
        return value
    import hashlib

    return f"sha256:{hashlib.sha256(value.encode(errors='surrogateescape')).hexdigest()[:_DIGEST_CHARACTERS]}"


def without_surrogates(text: str) -> str:
    r"""Return text with lone surrogates alone spelled out: `\udcff`. Every encoding of Unicode can write it."""
    return text.encode(errors="backslashreplace").decode()


def json_escaped(text: str) -> str:
    r"""Return JSON with each character that is no text, ends of lines aside, as an escape of JSON's own.

    JSON as `json.dumps(..., ensure_ascii=False)` gives it has such characters within strings only, so that it stays
    the same JSON: `\u202e` is read back as what it was.
    """
    return _SUSPECT.sub(lambda match: match[0] if match[0] in LINES else _in_json(match[0]), text)


def _in_json(char: str) -> str:
    return char if _shown(char) == char else json.dumps(char)[1:-1]


@cache
def _shown(char: str) -> str:
    unsafe = unicodedata.category(char) in _UNSAFE or char in _BLANK
    return char.encode("unicode_escape").decode() if unsafe else char
