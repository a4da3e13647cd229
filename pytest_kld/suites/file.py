"""Reads a suite file, `*.kld.toml`. Every mistake is reported with its line and key, and with what is valid."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_kld.errors import SuiteError
from pytest_kld.suites.keys import CANDIDATE_KEYS, LIMIT_KEYS, PROTOCOL_KEYS, REFERENCE_KEYS, Key, shown
from pytest_kld.suites.toml_lines import KeyLines, KeyPath


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteFile:
    """A suite file whose keys and types are right.

    Attributes:
        path: the file.
        reference: the keys of its reference; empty if it has none.
        protocol: options as the command line would give them, by name.
        limits: the bounds that hold for all candidates.
        candidates: the keys of each candidate.
        lines: where each key is.

    """

    path: Path
    reference: Mapping[str, Any]
    protocol: Mapping[str, Any]
    limits: Mapping[str, float]
    candidates: Sequence[Mapping[str, Any]]
    lines: KeyLines

    def at(self, *key: str | int) -> str:
        """Return the place of a key, for a message: `release.kld.toml:12: candidate[1].args`."""
        return f"{self.path.name}:{self.lines.of(key)}: {_dotted(key)}"


def read_suite_file(path: Path) -> SuiteFile:
    """Read a suite file.

    Raises:
        SuiteError: it cannot be read, is not TOML, or has unknown keys or values of a wrong type. The message has a
            line for each mistake.

    """
    try:
        content = path.read_text(encoding="utf-8")
        data = tomllib.loads(content)
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path.name}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # very long numbers and deep nesting are not TOMLDecodeErrors
        raise SuiteError(f"{path.name}: is not TOML: {error}") from None
    return _Reader(path, data, KeyLines(content)).read()


@dataclass(slots=True)
class _Reader:
    path: Path
    data: dict[str, Any]
    lines: KeyLines
    mistakes: list[tuple[int, str]] = field(default_factory=list)

    def read(self) -> SuiteFile:
        valid = ("reference", "protocol", "limits", "candidate")
        for name in self.data:
            if name not in valid:
                self._mistake((name,), f"unknown key {name!r}; valid are {', '.join(valid)}")
        reference = self._table(REFERENCE_KEYS, ("reference",), self.data.get("reference"))
        protocol = self._table(PROTOCOL_KEYS, ("protocol",), self.data.get("protocol"))
        bounds = self._table(LIMIT_KEYS, ("limits",), self.data.get("limits"))
        candidates = self.data.get("candidate", [])
        if not isinstance(candidates, list) or not candidates:
            self._mistake(("candidate",), "expected at least one table [[candidate]]")
            candidates = []
        read = [self._table(CANDIDATE_KEYS, ("candidate", index), one) for index, one in enumerate(candidates)]
        if self.mistakes:
            raise SuiteError("\n".join(message for _, message in sorted(self.mistakes)))
        return SuiteFile(
            path=self.path, reference=reference, protocol=protocol, limits=bounds, candidates=read, lines=self.lines
        )

    def _table(self, keys: Mapping[str, Key], where: KeyPath, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._mistake(where, f"expected a table, got {shown(value)}")
            return {}
        read = {}
        for name, one in value.items():
            if name not in keys:
                self._mistake((*where, name), f"unknown key {name!r}; valid are {', '.join(keys)}")
                continue
            try:
                read[name] = keys[name].check(one)
            except ValueError as error:
                self._mistake((*where, name, *getattr(error, "where", ())), str(error))
        for key in keys.values():
            if key.required and key.name not in value:
                self._mistake(where, f"the key {key.name!r} is missing")
        return read

    def _mistake(self, where: KeyPath, what: str) -> None:
        line = self.lines.of(where)
        self.mistakes.append((line, f"{self.path.name}:{line}: {_dotted(where)}: {what}"))


def _dotted(key: KeyPath) -> str:
    """Return a key as a message names it; candidates count from 1."""
    written = ""
    for part in key:
        written += f"[{part + 1}]" if isinstance(part, int) else f"{'.' if written else ''}{part}"
    return written
