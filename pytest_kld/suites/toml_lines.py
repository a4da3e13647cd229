"""Where the keys of a TOML document are, which `tomllib` does not tell."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]
"""A key: names of tables and keys, and indices in arrays, from the top of the document."""

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}=,.\n]|'
    r"[^\s\[\]{}=,.#\"']+",
    re.DOTALL,
)
"""Strings, comments, punctuation, line ends, and everything else (bare keys and parts of values)."""


@dataclass(slots=True)
class KeyLines:
    """The lines of the keys in a document that `tomllib` has accepted.

    Attributes:
        text: the document.
        lines: for each key, the number of its line, from 1.

    """

    text: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    _tokens: list[tuple[str, int]] = field(default_factory=list)
    _at: int = 0

    def __post_init__(self) -> None:
        """Scan the document."""
        line, counted = 1, 0
        for match in _TOKEN.finditer(self.text):
            line += self.text.count("\n", counted, match.start())
            counted = match.start()
            if not match[0].startswith("#"):
                self._tokens.append((match[0], line))
        self._scan()

    def of(self, path: KeyPath) -> int:
        """Return the line of a key, or of the closest table around it; 1 if there is none."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def _scan(self) -> None:
        table: KeyPath = ()
        tables: Counter[KeyPath] = Counter()
        while self._at < len(self._tokens):
            word, line = self._tokens[self._at]
            if word == "\n":
                self._at += 1
            elif word == "[":
                self._at += 1
                is_array = self._peek() == "["
                self._at += is_array
                table = self._resolve(self._key("]"), tables)
                self._at += 1 + is_array
                if is_array:
                    tables[table] += 1
                    table = (*table, tables[table] - 1)
                self.lines.setdefault(table, line)
            else:
                self._assignment(table)

    def _resolve(self, names: KeyPath, tables: Counter[KeyPath]) -> KeyPath:
        """Return the path of a header: `[candidate.axes]` belongs to the last `[[candidate]]`."""
        path: KeyPath = ()
        for index, name in enumerate(names):
            path = (*path, name)
            if index < len(names) - 1 and path in tables:
                path = (*path, tables[path] - 1)
        return path

    def _assignment(self, table: KeyPath) -> None:
        line = self._tokens[self._at][1]
        names = self._key("=")
        self._at += 1
        for length in range(1, len(names) + 1):
            self.lines.setdefault((*table, *names[:length]), line)
        self._value((*table, *names))

    def _key(self, end: str) -> KeyPath:
        names: list[str] = []
        while (word := self._peek()) not in (end, ""):
            self._at += 1
            if word != ".":
                names.append(_name(word))
        return tuple(names)

    def _value(self, path: KeyPath) -> None:
        opening = self._peek()
        if opening not in ("[", "{"):
            while self._peek() not in (",", "]", "}", "\n", ""):
                self._at += 1
            return
        self._at += 1
        count = 0
        while (word := self._peek()) not in ("]", "}", ""):
            if word in (",", "\n"):
                self._at += 1
            elif opening == "{":
                self._assignment(path)
            else:
                self.lines.setdefault((*path, count), self._tokens[self._at][1])
                self._value((*path, count))
                count += 1
        self._at += 1

    def _peek(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""


def _name(word: str) -> str:
    """Return the name that a bare or quoted key spells."""
    if word[0] not in "\"'":
        return word
    return str(tomllib.loads(f"key = {word}")["key"])
