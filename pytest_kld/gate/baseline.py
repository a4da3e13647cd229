"""Baselines: earlier results that a release is held against, each a small text file that can be reviewed in git."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import BaselineError
from pytest_kld.files import json_bytes, sha256_of_json, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_kld.gate.regression import Change
    from pytest_kld.gate.result import GateResult

SCHEMA_VERSION = 1
_NAME_LENGTH = 80
_NOT_FINITE = ("nan", "inf", "-inf")
_COMPARED = {
    "reference": "the reference",
    "path": "the path through the engine",
    "texts": "the dataset",
    "windows": "the number of windows",
    "window_size": "the window size",
    "stride": "the stride",
    "windows_from": "--kld-windows-from",
    "decoding": "how windows are decoded",
    "skip_first": "--kld-skip-first",
    "head": "--kld-head",
    "stores": "what the captures keep",
    "vocab_size": "the common vocabulary",
    "token_ids_sha256": "the token ids",
}
"""What has to agree for two results to be comparable, and what it is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """An earlier result of one Subject.

    Attributes:
        subject: the candidate's label.
        reference: the reference's label.
        figures: every figure of `Summary`.
        measured: what has to agree with a result that is held against it, see `how_measured`.
        made_from: the model's name and identity, the engine with versions and arguments, the digests of capture, cache
            keys and scores, the version of pytest-kld, and when the result was reported.

    """

    subject: str
    reference: str
    figures: Mapping[str, Any]
    measured: Mapping[str, Any]
    made_from: Mapping[str, Any]

    @classmethod
    def of(cls, result: GateResult, created: str) -> Baseline:
        """Make a baseline from a result.

        Args:
            result: a measured result.
            created: when it was reported, in ISO 8601.

        Raises:
            BaselineError: nothing was measured.

        """
        if result.figures is None or result.about is None:
            raise BaselineError(f"{result.candidate.label} was not measured, so there is nothing to promote")
        return cls(
            subject=result.candidate.label,
            reference=result.reference.label,
            figures=result.figures,
            measured=how_measured(result.about),
            made_from={
                "created": created,
                "nodeid": result.nodeid,
                "pytest_kld": result.about["versions"].get("pytest-kld", ""),
                "reference": {"model": result.reference.label, **_made_from(result.about["reference"])},
                "candidate": {"model": result.candidate.label, **_made_from(result.about["candidate"])},
                "dataset": result.about["protocol"]["dataset"],
                "scores": result.about["scores"],
            },
        )

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Read a baseline.

        Raises:
            BaselineError: the file cannot be read, is not a baseline, or is one of another schema.

        """
        try:
            data = json.loads(path.read_bytes())
            version = data.pop("schema_version")
            baseline = cls(**data)
        except OSError as error:
            raise BaselineError(f"cannot read the baseline {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BaselineError(f"{path} is not a baseline of pytest-kld: {error!r}. Promote one again.") from error
        if version != SCHEMA_VERSION:
            raise BaselineError(f"the baseline {path} has schema_version {version!r}; this is {SCHEMA_VERSION}")
        figures = {
            name: float(value) if isinstance(value, str) and value in _NOT_FINITE else value
            for name, value in _mapping(path, "figures", baseline.figures).items()
        }
        if wrong := [name for name, value in figures.items() if not isinstance(value, int | float | None)]:
            raise BaselineError(f"{path}: figures.{wrong[0]} is not a number. Promote it again.")
        if missing := [name for name in _COMPARED if name not in _mapping(path, "measured", baseline.measured)]:
            raise BaselineError(f"{path}: measured.{missing[0]} is missing. Promote it again.")
        for side in ("reference", "candidate"):
            if not isinstance(_mapping(path, "made_from", baseline.made_from).get(side), dict):
                raise BaselineError(f"{path}: made_from.{side} is missing. Promote it again.")
        return cls(**{**data, "figures": figures})

    def save(self, path: Path) -> None:
        """Write it, completely or not at all.

        Raises:
            ReportError: the file cannot be written.

        """
        data = {"schema_version": SCHEMA_VERSION, **asdict(self), "figures": in_json(self.figures)}
        write_report(path, json_bytes(data, sort=False))

    def what_differs(self, about: Mapping[str, Any]) -> list[str]:
        """Return what keeps a result from being held against this baseline, a phrase each; empty if nothing does.

        Args:
            about: what the result compared and how, see `Scores.about`.

        """
        now = how_measured(about)
        found = [
            f"{words} ({_brief(self.measured[name])} in the baseline, {_brief(now[name])} now)"
            for name, words in _COMPARED.items()
            if self.measured[name] != now[name]
        ]
        # Other ids follow from any other difference in how the windows were made; by themselves they are news.
        return found[:-1] if len(found) > 1 and found[-1].startswith(_COMPARED["token_ids_sha256"]) else found

    def notes(self, about: Mapping[str, Any]) -> list[str]:
        """Return what may explain a change beside the candidate's weights: other engines or versions."""
        found = []
        for side in ("reference", "candidate"):
            before, now = self.made_from[side], _made_from(about[side])
            parts = [
                f"{name} {_brief(before.get(name))} → {_brief(now[name])}"
                for name in ("engine", "versions", "arguments")
                if before.get(name) != now[name]
            ]
            if parts:
                found.append(f"since the baseline, the {side} runs in another way: {'; '.join(parts)}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A result held against a baseline.

    Attributes:
        file: the baseline's file.
        baseline: the baseline.
        changes: the figures side by side.
        paired: whether intervals of differences come from the scores of both.
        notes: what a reader should know about the comparison.

    """

    file: Path
    baseline: Baseline
    changes: tuple[Change, ...]
    paired: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "file": str(self.file),
            "created": self.baseline.made_from.get("created"),
            "made_from": self.baseline.made_from["candidate"],
            "paired": self.paired,
            "changes": [change.to_json() for change in self.changes],
            "notes": list(self.notes),
        }


def how_measured(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to agree for two results to be comparable. Nothing in it depends on the machine."""
    protocol, key = about["protocol"], about["reference"].get("key")
    return {
        "reference": sha256_of_json(key["model"]) if key else about["reference"]["digest"],
        "path": (key or {}).get("path", "prefill"),
        "texts": [part["text_sha256"] for part in protocol["datasets"]],
        **{name: protocol.get(name) for name in ("windows", "window_size", "stride", "windows_from", "decoding")},
        **{name: about[name] for name in ("skip_first", "head")},
        "stores": [about[side]["store"] for side in ("reference", "candidate")],
        "vocab_size": about["vocab_size"],
        "token_ids_sha256": protocol["token_ids_sha256"],
    }


def _made_from(side: Mapping[str, Any]) -> dict[str, Any]:
    key = side.get("key") or {}
    engine = key.get("engine") or {}
    model = key.get("model")
    return {
        "identity": model if model is None or len(json.dumps(model)) < 500 else {"sha256": sha256_of_json(model)},
        "engine": engine.get("engine"),
        "versions": engine.get("versions"),
        "arguments": engine.get("arguments"),
        "key": sha256_of_json(key)[:32] if key else None,
        "capture": side["digest"],
    }


def baseline_file(directory: Path, label: str) -> Path:
    """Return the file of a Subject's baseline: its label in safe characters, and a digest that tells labels apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", label.replace("/", "--")).strip("-.")[-_NAME_LENGTH:].strip("-.")
    return directory / f"{safe}-{hashlib.sha256(label.encode(errors='surrogateescape')).hexdigest()[:8]}.json"


def find_baseline(directory: Path, label: str) -> Baseline | None:
    """Return a Subject's baseline; None if it has none.

    Raises:
        BaselineError: its file is damaged, or holds the baseline of another Subject.

    """
    path = baseline_file(directory, label)
    if not path.exists():
        return None
    baseline = Baseline.load(path)
    if baseline.subject != label:
        raise BaselineError(f"{path} holds the baseline of {baseline.subject}, not of {label}. Promote it again.")
    return baseline


def no_baseline(directory: Path, label: str) -> str:
    """Say that a Subject has no baseline, and what to do."""
    return (
        f"there is no baseline of {label} in {directory}, so --kld-max-regression cannot be checked. Gate it once "
        "without --kld-max-regression, with --kld-json=FILE, and promote the result with `pytest-kld baseline promote "
        f"FILE {directory}`."
    )


def _mapping(path: Path, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BaselineError(f"{path}: {name} is not an object. Promote it again.")
    return value


def in_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with the numbers that JSON lacks as the strings `nan`, `inf` and `-inf`."""
    return {name: str(value) if str(value) in _NOT_FINITE else value for name, value in figures.items()}


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
